from pipeline.foreign_text import printable


def test_text_from_a_file_is_one_line_of_what_can_be_printed_and_not_longer_than_asked():
    assert printable("a\n b\x1b[2J\u202e\tc…", 100) == "a b[2J c…"
    assert printable("x" * 50, 7) == "x" * 7
    assert printable(None, 9) == "None"
