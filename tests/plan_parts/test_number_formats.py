from hafl_app.plan_parts.component_lists import BIT_LEVELS
from hafl_app.plan_parts.number_formats import component_bytes, largest_code


def test_a_component_takes_two_whole_vectors_and_their_scales():
    assert [component_bytes(b, 7, 5) for b in BIT_LEVELS] == [0, 2 + 2 + 4, 4 + 3 + 4, 16, 28]
    assert [largest_code(b) for b in BIT_LEVELS[1:]] == [1, 7, 127, 32767]
