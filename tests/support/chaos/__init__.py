"""The kill test: processes are killed at random moments, and every row that is served is checked.

    python -m tests.support.chaos --n 1000 --seed 1

docs/design/chaos.md says what is killed, what is compared, and what a seed reproduces.
"""
