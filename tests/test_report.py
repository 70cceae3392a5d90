import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from results import comparison, estimate, result, typed, write_run

from eva_rl.errors import UserError
from eva_rl.run import Estimate, Scores, Stopwatch, run_result, scores
from eva_rl.run.tensorboard import write_hparams
from eva_rl.study import compare, compared, document, read_results, save_report
from eva_rl.study.labels import labelled
from eva_rl.study.read import _runs_below
from eva_rl.study.runs import table, to_csv
from eva_rl.table import markdown


@dataclass(frozen=True)
class Played:
    """Episodes as scores are made of."""

    returns: np.ndarray
    successes: np.ndarray | None
    solved_at_end: np.ndarray | None


@pytest.fixture
def report(run):
    """The command in this process."""

    def call(*arguments: object) -> subprocess.CompletedProcess:
        status, out, err = run("report", *arguments)
        return subprocess.CompletedProcess(arguments, status, out, err)

    return call


def test_the_table_has_a_row_a_run(tmp_path):
    write_run(tmp_path / "a", result())
    write_run(tmp_path / "b", result(task="dummy/Other-v0", success=1.0))
    results, left_out = read_results([tmp_path])
    assert left_out == []
    lines = table(labelled(results)).splitlines()
    assert len(lines) == 2 + 2
    assert "0.50 [0.40, 0.60]" in lines[3]


SILENT = {"success_rate": None, "success_at_end": None}


def test_a_run_without_success_counts_as_failed_where_another_run_of_its_task_knows_success(tmp_path):
    write_run(tmp_path / "a", result("eva", success=1.0))
    write_run(tmp_path / "b", result("lora", **SILENT))
    write_run(tmp_path / "c", result("eva", task="dummy/Other-v0", **SILENT))
    results = {(r.adapter, r.task): r for r in read_results([tmp_path])[0]}
    failed = results["lora", "dummy/Steps-v0"].scores["success_rate"]
    assert (failed.mean, failed.low, failed.n) == (0.0, 0.0, 20)
    assert failed.high == pytest.approx(0.1611, abs=1e-4)  # Wilson's for none of twenty
    [study] = compared([run for run in results.values() if run.task == "dummy/Steps-v0"]).studies
    assert study.scores("lora") == {"dummy/Steps-v0": [0.0]}
    # Its zero-shot scores say success.
    assert results["eva", "dummy/Other-v0"].scores["success_rate"].mean == 0.0


def test_where_no_run_of_a_task_knows_success_it_stays_unknown(tmp_path):
    for number, name in enumerate(("eva", "lora")):
        silent = dict(result()["zero_shot"], **SILENT)
        write_run(tmp_path / name, result(name, seed=number, **SILENT, zero_shot=silent))
    assert [run.scores["success_rate"] for run in read_results([tmp_path])[0]] == [None, None]


FACTS = ("task", "adapter", "base", "demonstrations", "dataset", "target_return", "steps", "learning_rate", "seed")
FACTS += ("trainable_parameters", "total_parameters", "settings")


def outcome(zero_shot: Scores, tuned: Scores, curve: dict[str, Scores] | None = None) -> dict:
    """The result.json of a run with these scores."""
    facts = {name: result()[name] for name in FACTS}
    return run_result(facts, Stopwatch("init", "train"), zero_shot, tuned, curve=curve).to_json()


def test_a_run_that_knows_success_in_one_of_its_scores_failed_in_the_others():
    silent = scores(Played(np.ones(4), None, None), None)
    solved = scores(Played(np.ones(4), np.array([True] * 4), np.array([True] * 4)), None)
    found = outcome(silent, solved, {"5": silent, "6": solved})
    rates = [found["zero_shot"], found["curve"]["5"], found["curve"]["6"], found]
    assert [group["success_rate"]["mean"] for group in rates] == [0.0, 0.0, 1.0, 1.0]
    assert found["zero_shot"]["success_at_end"]["n"] == 4
    assert found["zero_shot"]["normalized_score"] is None
    assert outcome(silent, silent)["success_rate"] is None
    assert outcome(scores(None, None), solved)["zero_shot"]["success_rate"] is None


def test_what_was_not_rolled_out_has_no_success(tmp_path):
    write_run(tmp_path / "a", result(before=None))
    [run] = read_results([tmp_path])[0]
    assert run.zero_shot["success_rate"] is None


@pytest.mark.parametrize(
    "settings", [{"adapter.rank": 4}, {"adapter.eva.rho": 2}, {"episodes": 7}, {"training.batch_size": 8}]
)
def test_the_table_names_what_tells_runs_apart(tmp_path, settings):
    write_run(tmp_path / "a", result())
    write_run(tmp_path / "b", result(settings=settings))
    [name] = [key.removeprefix("adapter.eva.") for key in settings]
    lines = table(labelled(read_results([tmp_path])[0])).splitlines()
    place = 2 if "eva" in next(iter(settings)) else [cell.strip() for cell in lines[0].split("|")].index(name)
    assert len({line.split("|")[place] for line in lines[2:]}) == 2


WRONG = [
    {"settings": None},
    {"settings": []},
    {"seed": "0"},
    {"curve": None},
    {"curve": {"50": {}}},
    {"curve": {"soon": {}}},
    {"zero_shot": None},
    {"zero_shot": {}},
    {"seconds": {}},
    {"seconds": {"init": 1, "train": 2, "rollout": "long"}},
    {"success_rate": 0.5},
    {"success_rate": {"mean": float("nan"), "low": None, "high": None, "n": 3}},
    {"success_rate": {"mean": 0.5, "low": 0.4, "n": 3}},
    {"success_rate": {"mean": 7.0, "low": None, "high": None, "n": 3}},
    {"success_rate": {"mean": 0.5, "low": None, "high": None, "n": 0}},
    {"success_at_end": {"mean": 0.5, "low": -0.2, "high": 0.9, "n": 3}},
    {"learning_rate": None},
    {"precision": 16},
    {"trainable_parameters": None},
    {"trainable_parameters": 10**400},
    {"trainable_parameters": -1},
    {"steps": 3},
    {"task": "dummy/Other-v0"},
    {"base_sha256": 1},
    {"versions": {"torch": None}},
    {"dataset": None},
]


@pytest.mark.parametrize("changes", WRONG, ids=lambda changes: str(changes)[:60])
def test_a_result_that_is_not_as_a_run_writes_it_is_named_and_left_out(tmp_path, changes):
    write_run(tmp_path / "whole", result())
    write_run(tmp_path / "wrong", result(seed=1) | changes)
    results, [sentence] = read_results([tmp_path])
    assert len(results) == 1
    assert sentence.startswith(f"{tmp_path / 'wrong'}: ")
    assert next(iter(changes)) in sentence


def test_a_run_that_wrote_nothing_yet_is_named(tmp_path):
    write_run(tmp_path / "whole", result())
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").touch()
    _, [sentence] = read_results([tmp_path])
    assert "begun: not a complete" in sentence


def test_a_folder_that_goes_while_it_is_looked_through_is_no_error(tmp_path):
    write_run(tmp_path / "runs", result())
    (tmp_path / "runs" / "checkpoints").mkdir()
    found = _runs_below(tmp_path / "runs")
    assert next(found) == tmp_path / "runs"
    (tmp_path / "runs" / "checkpoints").rmdir()
    assert list(found) == []


def test_a_run_half_written_is_none(tmp_path):
    write_run(tmp_path / "runs" / ".half", result())
    assert read_results([tmp_path]) == ([], [])


def test_of_several_folders_one_without_runs_is_named_and_runs_have_their_folders_names(tmp_path):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "mine" / "a", result())
    [found], [sentence] = read_results([tmp_path / "empty", tmp_path / "mine"])
    assert sentence == f"{tmp_path / 'empty'}: there are no runs below it"
    assert found.run == str(tmp_path / "mine" / "a")


@pytest.mark.parametrize("content", ["[" * 100_000, "", "{", "[]", '{"status": "partial"}', '{"status": "complete"}'])
def test_runs_that_are_not_complete_are_named_and_left_out(tmp_path, content):
    write_run(tmp_path / "whole", result())
    broken = write_run(tmp_path / "broken", content)
    results, left_out = read_results([tmp_path])
    assert len(results) == 1
    assert [str(broken) in sentence for sentence in left_out] == [True]


def test_a_run_without_a_result_is_named(tmp_path):
    write_run(tmp_path / "whole", result())
    (write_run(tmp_path / "begun", result(seed=1)) / "result.json").unlink()
    results, [sentence] = read_results([tmp_path])
    assert len(results) == 1
    assert "begun: not a complete" in sentence


def test_the_same_run_twice_counts_once_and_is_named(tmp_path):
    write_run(tmp_path / "a", result())
    write_run(tmp_path / "b", result(success=0.9))
    [kept], [sentence] = read_results([tmp_path])
    assert kept.scores["success_rate"].mean == 0.5
    assert f"{tmp_path / 'b'}: the same run as {tmp_path / 'a'}" in sentence


def test_the_zero_shot_scores_a_run_left_to_the_untrained_one_are_taken_from_there(tmp_path):
    write_run(tmp_path / "none", result("none", success=0.3, before=0.3))
    write_run(tmp_path / "eva", result("eva", before=None))
    write_run(tmp_path / "elsewhere", result("eva", "dummy/Other-v0", before=None))
    write_run(tmp_path / "other-return", result("lora", before=None, target_return=7.0))
    found = {(r.adapter, r.task): r.zero_shot["success_rate"] for r in read_results([tmp_path])[0]}
    assert found["eva", "dummy/Steps-v0"] == Estimate(**estimate(0.3))
    assert found["eva", "dummy/Other-v0"] is None
    assert found["lora", "dummy/Steps-v0"] is None


def test_runs_on_other_weights_of_a_base_lend_each_other_no_scores(tmp_path):
    write_run(tmp_path / "none", result("none", success=0.3, before=0.3, base_sha256="a"))
    write_run(tmp_path / "same", result("eva", before=None, base_sha256="a"))
    write_run(tmp_path / "unsaid", result("lora", before=None))
    write_run(tmp_path / "other", result("dora", before=None, base_sha256="b"))
    write_run(tmp_path / "z", result("eva", before=None, base_sha256="b"))
    results, [sentence] = read_results([tmp_path])
    found = {r.adapter: r.zero_shot["success_rate"] for r in results}
    assert found["eva"] == found["lora"] == Estimate(**estimate(0.3))
    assert found["dora"] is None
    assert (
        sentence == f"{tmp_path / 'z'}: the same run as {tmp_path / 'same'}, but for the weights of its base, left out"
    )


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        read_results([tmp_path / "nowhere"])


def test_the_command_answers_an_empty_folder_in_one_sentence_and_writes_nothing(tmp_path, report):
    done = report(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: There is no complete fine-tuning run in these folders.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def study(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for adapter in ("none", "full", "lora", "eva"):
        for task in ("dummy/A", "dummy/B"):
            for seed in range(3):
                curve = {25: rng.random(), 50: rng.random()}
                run = result(adapter, task, seed, rng.random(), before=0.1 if adapter == "none" else None, curve=curve)
                write_run(tmp_path / "study" / adapter / f"{task}-{seed}", run)
    return tmp_path / "study"


@pytest.mark.slow
def test_the_report_of_a_folder_is_the_same_bytes_when_it_is_made_again(study, tmp_path, report):
    done = report(study, "--output", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "eva_rl.report", study, "--output", tmp_path / "two"]
    subprocess.run(command, check=True)  # another process numbers its objects otherwise
    files = sorted(path.name for path in (tmp_path / "one").iterdir() if path.is_file())
    names = {"scores", "curves", "pareto", "improvement"}
    assert set(files) == {"report.md", "runs.csv", *(f"{name}.png" for name in names)}
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_report_has_the_methods_the_tasks_and_every_run(study, report):
    done = report(study)
    assert done.returncode == 0, done.stderr
    text = (study / "report" / "report.md").read_text()
    for heading in ("interquartile mean", "area under curve", "steps to half of full", "P(row > column)", "## Runs"):
        assert heading in text
    assert text.count("dummy/A") == 12
    assert len((study / "report" / "runs.csv").read_text().splitlines()) == 1 + 24


def test_one_method_has_its_scores_by_task_with_intervals_and_pictures(study, report):
    report(study / "lora", study / "none", "--output", study / "both")
    assert report(study / "lora").returncode == 0
    text = (study / "lora" / "report" / "report.md").read_text()
    [both] = [line for line in (study / "both" / "report.md").read_text().splitlines() if line.startswith("| lora")][:1]
    [alone] = [line for line in text.splitlines() if line.startswith("| lora")][:1]
    assert "[" in alone.split("|")[2]
    assert alone.split("|")[2].split() == both.split("|")[2].split()
    assert "P(row > column)" not in text
    assert {path.name for path in (study / "lora" / "report").glob("*.png")} == {"scores.png", "pareto.png"}


def test_learning_curves_without_a_beginning_or_a_reference_are_said_to_be(study, report):
    done = report(study / "lora", study / "eva")
    assert "eva; lora: no learning curve, which begins with the base as it is: add runs of adapter=none" in done.stderr
    assert "full: not there, so that curves are measured by nothing" in done.stderr
    done = report(study)
    assert "curve" not in done.stderr
    assert "Learning curves are straight lines between the scores at steps 0, 25, 50, 100." in done.stdout


def test_tensorboard_gets_every_runs_settings_and_scores(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    few = result("none", normalized_score=None)
    more = result("eva", settings={"adapter.eva.rho": 2, "adapter.budget": 5, "training.learning_rate": 1e-3})
    most = result("eva", seed=1, settings={"adapter.eva.rho": 1.5, "adapter.budget": "params"})
    write_hparams(tmp_path, typed([few, more, most]))
    columns = []
    for folder, own in zip(sorted(tmp_path.iterdir()), (few, more, most), strict=True):
        events = EventAccumulator(str(folder)).Reload()
        [score] = events.Scalars("result/success_rate")
        assert score.value == own["success_rate"]["mean"]
        found = {tag: HParamsPluginData.FromString(c) for tag, c in events.PluginTagToContent("hparams").items()}
        experiment = found["_hparams_/experiment"].experiment
        columns.append({info.name: info.type for info in experiment.hparam_infos})
        assert "result/normalized_score" in {info.name.tag for info in experiment.metric_infos}
        settings = found["_hparams_/session_start_info"].session_start_info.hparams
        assert settings["task"].string_value == own["task"]
        assert ("adapter.eva.rho" in settings) == (own is not few)
    text, number = columns[0]["task"], columns[0]["adapter.eva.rho"]
    assert text != number
    assert columns[0]["adapter.budget"] == text
    assert columns[0] == columns[1] == columns[2]


def test_what_is_left_out_is_said_on_stderr_and_in_the_report(study, report):
    (study / "eva" / "dummy" / "A-2" / "result.json").unlink()
    done = report(study)
    assert done.returncode == 0, done.stderr
    assert "A-2: not a complete fine-tuning run" in done.stderr
    assert "eva: missing dummy/A seed 2" in done.stderr
    text = (study / "report" / "report.md").read_text()
    assert "- eva: missing dummy/A seed 2" in text
    assert "A-2: not a complete fine-tuning run" in text


def test_pictures_of_an_earlier_report_that_are_no_more_go_and_nobody_elses(study, report):
    (study / "report").mkdir()
    mine = {"mine.png", "scores_of_mine.png", "curves-final.svg", "varied.2024.png", "improvements.png"}
    for name in ("scores-2.png", "varied.svg", *mine):
        (study / "report" / name).write_text("old")
    assert report(study).returncode == 0
    left = {path.name for path in (study / "report").iterdir()}
    assert left >= mine
    assert not left & {"scores-2.png", "varied.svg"}


def test_a_folder_hparams_that_is_not_a_reports_is_not_replaced(study, report):
    hparams = study / "report" / "hparams"
    hparams.mkdir(parents=True)
    (hparams / "mine.txt").write_text("mine")
    done = report(study)
    assert done.returncode == 1
    assert "is not a report's" in done.stderr
    assert [path.name for path in (study / "report").rglob("*.*")] == ["mine.txt"]
    (hparams / "mine.txt").rename(hparams / ".DS_Store")  # which a system leaves wherever one looks
    assert report(study).returncode == 0
    shutil.rmtree(hparams)
    hparams.write_text("mine")
    assert report(study).returncode == 1
    assert hparams.read_text() == "mine"
    hparams.rename(study / "mine")
    hparams.symlink_to(study)
    assert report(study).returncode == 1
    assert (study / "mine").read_text() == "mine"


def test_runs_that_were_not_made_alike_are_compared_and_counted():
    def sentence(facts):
        runs = [result(name, seed=seed, **own) for name in ("eva", "lora") for seed, own in enumerate(map(dict, facts))]
        return document(comparison(runs)).partition("\n\n|")[0]

    bfloat16, float32 = {"precision": "bfloat16"}, {"precision": "float32"}
    assert "differ" not in sentence([bfloat16, bfloat16])
    assert "Runs differ in the precision: bfloat16 (2), float32 (4)." in sentence([float32, bfloat16, float32])
    assert "Runs differ in the precision: float32 (2), not stated (2)." in sentence([{}, float32])
    settings = {"settings": {"training.precision": "float32"}}
    assert "differ" not in sentence([settings, settings | float32])
    assert "the version of torch: 2 (2), 3 (2)." in sentence([{}, {"versions": {"torch": "3"}}])
    assert "differ" not in sentence([{}, {"versions": {"torch": "2", "box2d": "1"}}])
    assert "Runs differ in the device: cpu (2), cuda (2)." in sentence([{"device": "cpu"}, {"device": "cuda"}])
    assert "Runs differ in the device: cpu (2), not stated (2)." in sentence([{}, {"device": "cpu"}])
    bases = [{"base_sha256": letter * 64} for letter in "ab"]
    assert f"the SHA-256 of the base's weights: {'a' * 12} (2), {'b' * 12} (2)." in sentence([{}, *bases])


def test_a_csv_has_scores_and_settings_of_every_run():
    runs = [result(run="a"), result("lora", seed=1, settings={"adapter.rank": 4}, normalized_score=None, run="b/c")]
    header, first, second = (line.split(",") for line in to_csv(labelled(typed(runs))).splitlines())
    assert dict(zip(header, second, strict=True))["run"] == "b/c"
    assert dict(zip(header, first, strict=True))["success_rate_mean"] == "0.5"
    assert dict(zip(header, second, strict=True))["adapter.rank"] == "4"
    assert dict(zip(header, second, strict=True))["normalized_score_mean"] == ""


def test_columns_of_a_markdown_table_are_aligned():
    lines = markdown(["a", "long header"], [("x", None), ("longer", 1)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[2].strip() == "–"


def test_a_phase_within_another_does_not_count_twice(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Stopwatch("train", "rollout")
    with clock("train"), clock("rollout"):
        pass
    assert clock.seconds == {"train": 7.0, "rollout": 3.0}


def test_a_phase_that_goes_on_counts_up_to_now(monkeypatch):
    now = iter([0.0, 2.0, 5.0, 6.0, 9.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Stopwatch("train", "rollout")
    with clock("train"):
        with clock("rollout"):
            pass
        assert clock.rounded() == {"train": 3.0, "rollout": 3.0}
    assert clock.rounded() == {"train": 6.0, "rollout": 3.0}


COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results"


# Small studies by default: a report of five hundred runs takes ten seconds.
LARGE = {"adapters", "cw10", "cw10_demonstrations", "cw10_eva", "cw10_ranks", "cw10_steps"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else [])
        for name in sorted(path.parents[1].name for path in COMMITTED.glob("*/report/report.md"))
    ],
)
def test_a_committed_report_is_what_its_runs_make(name, tmp_path):
    save_report(tmp_path, compare([COMMITTED / name]))
    for file in ("report.md", "runs.csv"):
        assert (tmp_path / file).read_bytes() == (COMMITTED / name / "report" / file).read_bytes()
