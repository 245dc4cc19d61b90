"""Coverage-guided fuzzing of what reads bytes that others made: `make fuzz`.

targets.py     what is fuzzed: functions of bytes that fail only on a mistake of ours
__main__.py    runs one of them under atheris
corpus/        what was found, one folder per target; test_corpus.py replays it with every test run
"""
