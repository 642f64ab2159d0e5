# just (pip install rust-just, or a package of your system); each line can be typed without it

# style and types
check:
    ruff check .
    ruff format --check .
    mypy --strict src

# all quick tests, or those named: just test tests/unit/metrics
test *arguments:
    pytest {{arguments}}

# the links and images of the Markdown files
docs:
    pytest -q tests/house/test_links.py
