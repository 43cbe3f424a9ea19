"""What a run writes, and which files it leaves alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from benchmarks.harness.result import Options, Result, presets, read, run, write
from tests.benchmarks.results import result


def test_a_result_made_of_an_older_one_keeps_the_presets_of_that_one(tmp_path: Path) -> None:
    old = dict.fromkeys(presets(), "as it was")
    options = Options(data=tmp_path, out=tmp_path)
    assert run(lambda _: result("new"), None, options, "command").policies == presets()
    recounted = run(lambda _: result("recounted", policies=old), None, options, "command")
    assert recounted.policies == old


def test_a_short_result_does_not_take_the_place_of_a_full_one(tmp_path: Path) -> None:
    def measured(options: Options) -> Result:
        return result("a", n={"prompts": 2 if options.short else 100})

    for short, kept in ((True, 2), (True, 2), (False, 100), (True, 100)):
        options = Options(data=tmp_path, out=tmp_path, short=short)
        assert run(measured, None, options, "command").n == {"prompts": 2 if short else 100}
        assert read(tmp_path / "a.json").n == {"prompts": kept}


def test_samples_lie_apart_and_are_read_back_where_they_still_are(tmp_path: Path) -> None:
    made = result("a", series={"kl": [0.5, 0.25]}, notes=["one", "two"])
    write(made, None, tmp_path)
    assert read(tmp_path / "a.json") == made
    assert "0.25" not in (tmp_path / "a.json").read_text()
    (tmp_path / "samples" / "a.json").unlink()
    assert read(tmp_path / "a.json") == msgspec.structs.replace(made, series={})


def test_numbers_of_numpy_are_written_as_numbers(tmp_path: Path) -> None:
    made = result("a")
    made.rows, made.series = [["a", np.float64(0.5), np.int64(3)]], {"b": [np.float32(0.25)]}
    write(made, None, tmp_path)
    found = read(tmp_path / f"{made.name}.json")
    assert found.rows == [["a", 0.5, 3]]
    assert found.series == {"b": [0.25]}
