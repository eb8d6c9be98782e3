"""The support matrix in the docs is what the tests say."""

import pytest
from support import ROOMS, ROOT, matrix


def test_the_page_is_made_of_the_tests(request):
    option, items = request.config.option, request.session.items
    files = {path for room in ROOMS for path in room.glob("test_*.py")}
    if option.keyword or option.markexpr or not files <= {item.path for item in items}:
        pytest.skip("compares with all tests, and some are not collected")
    assert matrix(items) == (ROOT / "docs" / "support.md").read_text(), "python tests/support.py > docs/support.md"
