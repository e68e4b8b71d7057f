from pipeline.meter import Meter, saw_tool


def test_the_peak_is_of_the_work_inside_and_not_of_what_was_freed_before():
    block = bytearray(400 << 20)
    del block
    with Meter() as idle:
        pass
    with Meter() as busy:
        block = bytearray(b"x" * (300 << 20))
        del block
    assert busy.peak_bytes - idle.peak_bytes > 200 << 20
    assert busy.seconds > 0


def test_a_tool_larger_than_this_process_sets_the_peak():
    with Meter() as meter:
        saw_tool(1 << 50)
    assert meter.peak_bytes == 1 << 50
    with Meter() as later:
        pass
    assert later.peak_bytes < 1 << 50
