"""A process killed at any stage of a save leaves a good checkpoint, and the next save cleans up."""


def test_a_kill_at_every_stage_loses_nothing(run_cases, tmp_path):
    assert run_cases("checkpoint/killed_saves.py", tmp_path) == 27
