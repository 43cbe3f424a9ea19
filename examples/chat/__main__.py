"""`python -m examples.chat`."""

import sys

from examples.chat.run import main

sys.exit(main())
