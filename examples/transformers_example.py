"""KVShare on a Hugging Face model, without vLLM.

    python -m examples.transformers_example [MODEL]

asks three similar questions and says how many rows of each prompt came from the store.
"""

import sys
import tempfile

from kvshare_connectors.transformers import KVShareModel

from examples.engines.small_model import prepare_model
from examples.prompts.families import FAMILIES


def main() -> None:
    """Three prompts of one family: the donor, and two that differ in names and numbers."""
    folder = sys.argv[1] if len(sys.argv) > 1 else prepare_model()
    family = FAMILIES[0]
    with (
        tempfile.TemporaryDirectory() as home,
        KVShareModel.load(folder, home=home, host_bytes="512MiB") as model,
    ):
        for prompt in (family.donor, *family.followers[:2]):
            answer = model.generate(prompt, max_new_tokens=32)
            print(
                f"{answer.reused} of {answer.prompt_tokens} rows reused,"
                f" first token after {answer.seconds:.2f} s: {answer.text!r}"
            )


if __name__ == "__main__":
    main()
