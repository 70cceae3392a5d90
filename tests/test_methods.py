"""Runs are compared where they can be, and what can't be is named."""

import pytest
from hydra import compose, initialize_config_module
from results import comparison, result, typed

from eva_rl.config import FinetuneConfig, choices, parse, protocol
from eva_rl.run import Estimate
from eva_rl.study import Study, document
from eva_rl.study.compare import Varied
from eva_rl.study.curves import area, steps_to
from eva_rl.study.plots import _spread, pareto_front, plots, to_png, varied_plot
from eva_rl.study.study import improvement, told_apart
from eva_rl.study.tables import method_table, task_table

CELLS = [(task, seed) for task in ("d/a", "d/b") for seed in range(3)]


def studies(contents: list[dict]) -> list[Study]:
    return comparison(contents).studies


def varied(contents: list[dict]) -> Varied | None:
    return comparison(contents).varied


def rows(table: str) -> dict[str, list[str]]:
    """A Markdown table's rows by their first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_methods_are_compared_on_what_all_of_them_ran_and_the_rest_is_named():
    results = [result("eva", *cell, 0.9) for cell in CELLS] + [result("lora", *cell, 0.4) for cell in CELLS[:-1]]
    [study] = studies(results)
    assert study.ranked() == ["eva", "lora"]
    assert {name: len(runs) for name, runs in study.methods.items()} == {"eva": 5, "lora": 5}
    assert study.amiss == [
        "lora: missing d/b seed 2; for all methods left out of the comparison",
        "d/b: missing seed 2, its mean is of the others",
    ]
    found = rows(method_table(study))
    assert found["eva"][0] == "0.90 [0.90, 0.90]"
    assert found["lora"][2] == "1.00"  # of no known width, as all runs agree


def test_methods_that_miss_the_same_runs_are_named_together():
    results = [result("eva", *cell) for cell in CELLS]
    results += [result(name, *cell) for name in ("lora", "dora") for cell in CELLS[:-1]]
    [study] = studies(results)
    assert study.amiss[0] == "dora; lora: missing d/b seed 2; for all methods left out of the comparison"


@pytest.mark.parametrize("setting", ["steps", "episodes", "training.batch_size", "base", "adapter.rank"])
def test_runs_of_other_protocols_are_never_compared_with_each_other(setting):
    results = [result(name, *cell) for name in ("eva", "lora") for cell in CELLS]
    results += [result(name, *cell, 1.0, settings={setting: 7}) for name in ("eva", "lora") for cell in CELLS]
    found = studies(results)
    assert len(found) == 2
    assert sorted(study.title.partition("=")[0] for study in found) == [setting, setting]
    assert f"{setting}=7" in {study.title for study in found}
    for study in found:
        assert {run.scores["success_rate"].mean for runs in study.methods.values() for run in runs} in ({0.5}, {1.0})


def test_methods_of_one_name_are_told_apart_by_what_differs():
    results = [result("eva", *cell, settings={"adapter.eva.rho": rho}) for rho in (1, 2) for cell in CELLS]
    results += [result("lora", *cell) for cell in CELLS]
    [study] = studies(results)
    assert set(study.methods) == {"eva, eva.rho=1", "eva, eva.rho=2", "lora"}


def test_a_variant_is_named_by_what_is_not_common_among_the_variants():
    variants = [{}, {"adapter.eva.rho": 2}, {"adapter.eva.center": False}]
    common = {"adapter.eva.rho": 1, "adapter.eva.center": True}
    results = [
        result("eva", *cell, settings=common | own | {"adapter.config.rho": (common | own)["adapter.eva.rho"]})
        for own in variants
        for cell in CELLS
    ]
    [study] = studies(results)
    assert set(study.methods) == {"eva", "eva, eva.rho=2", "eva, eva.center=False"}


def test_methods_of_one_name_are_told_apart_across_protocols_too():
    variant = {8: {"adapter.eva.rho": 1}, 4: {"adapter.eva.rho": 2}}
    results = [
        result("eva", *cell, settings={"adapter.rank": rank} | own) for rank, own in variant.items() for cell in CELLS
    ]
    found = varied(results)
    assert {name: [value for value, _ in line] for name, line in found.lines.items()} == {
        "eva, eva.rho=1": [8],
        "eva, eva.rho=2": [4],
    }


def test_the_commonest_value_is_that_of_most_runs():
    others = [{"adapter.eva.rho": rho, "adapter.eva.tau": 0.9} for rho in (2, 3)]
    common = {"adapter.eva.rho": 1, "adapter.eva.tau": 0.99}
    results = [result("eva", *cell, settings=common | {"steps": n}) for n in (1, 2, 3) for cell in CELLS]
    results += [result("eva", *cell, settings=own | {"steps": 1}) for own in others for cell in CELLS]
    assert set(studies(results)[0].methods) == {"eva", *(f"eva, eva.rho={n}, eva.tau=0.9" for n in (2, 3))}


def test_what_follows_from_the_rank_is_not_named_beside_what_tells_variants_apart():
    results = [
        result("lora", *cell, settings={"adapter.rank": rank, "adapter.config.r": rank, "adapter.config.alpha": alpha})
        for rank in (2, 4)
        for alpha in (1, 2)
        for cell in CELLS
    ]
    assert set(varied(results).lines) == {"lora, config.alpha=1", "lora, config.alpha=2"}


def test_words_and_switches_of_an_adapters_config_tell_variants_apart_across_protocols():
    for values in (("none", "all"), (False, True)):
        results = [
            result("lora", *cell, settings={"steps": steps, "adapter.config.bias": value})
            for steps, value in zip((100, 200), values, strict=True)
            for cell in CELLS
        ]
        assert set(varied(results).lines) == {f"lora, config.bias={value}" for value in values}


def test_a_size_that_follows_from_the_rank_makes_no_variant():
    results = [
        result(name, *cell, settings={"adapter.rank": rank, "adapter.config.r": rank})
        for name in ("eva", "lora")
        for rank in (2, 4)
        for cell in CELLS
    ]
    assert set(varied(results).lines) == {"eva", "lora"}


@pytest.mark.parametrize("setting", ["adapter.eva", "adapter.ratios"])
@pytest.mark.parametrize("value", [None, {}])
def test_a_setting_that_is_null_or_empty_is_not_one_that_is_missing(setting, value):
    results = [result("lora", *cell, settings=own) for own in ({}, {setting: value}) for cell in CELLS]
    [study] = studies(results)
    assert len(study.methods) == 2


def test_runs_that_no_label_tells_apart_are_left_out_and_named():
    results = [result("lora", *cell, settings={"adapter.config.x": x}) for x in (8, "8") for cell in CELLS[:1]]
    results += [result("lora", *cell, settings={"adapter.config.x": 8}) for cell in CELLS[1:]]
    results += [result("lora", *cell, settings={"adapter.config.x": 5}) for cell in CELLS]
    [study] = studies(results)
    assert "lora, config.x=8: d/a, seed 0 left out: it is there twice, with other settings" in study.amiss
    assert all(len(runs) == 5 for runs in study.methods.values())


def test_a_method_with_few_runs_does_not_take_the_others_theirs():
    results = [result(name, *cell) for name in ("eva", "lora") for cell in CELLS] + [result("dora", *CELLS[0])]
    [study] = studies(results)
    assert set(study.methods) == {"eva", "lora"}
    assert study.amiss == ["dora: left out, as it has few runs (1, where half of the methods have 6 or more)"]
    [study] = studies([*results, result("pissa", *CELLS[0])])
    assert set(study.methods) == {"eva", "lora"}
    [study] = studies(
        [result("eva", *cell) for cell in CELLS] + [result("dora", *CELLS[0])]
    )  # of two, both are asked for
    assert {name: len(runs) for name, runs in study.methods.items()} == {"eva": 1, "dora": 1}


def test_one_method_with_many_runs_does_not_push_the_others_out():
    results = [result(name, *cell) for name in ("eva", "dora") for cell in CELLS[:2]]
    results += [result("lora", *cell) for cell in CELLS]
    [study] = studies(results)
    assert {name: len(runs) for name, runs in study.methods.items()} == {"dora": 2, "eva": 2, "lora": 2}


def test_a_method_alone_under_its_protocol_is_named():
    results = [result(name, *cell) for name in ("eva", "lora") for cell in CELLS]
    results += [result("dora", *cell, settings={"steps": 7, "training.batch_size": 4}) for cell in CELLS]
    amiss = [sentence for study in studies(results) for sentence in study.amiss]
    assert amiss == ["dora: no other method to compare it with under steps=7, training.batch_size=4"]


def test_protocols_stand_in_the_order_of_their_numbers():
    results = [
        result(name, *c, settings={"steps": n}) for n in (1000, 50, 100) for name in ("eva", "lora") for c in CELLS
    ]
    assert [study.title for study in studies(results)] == ["steps=50", "steps=100", "steps=1000"]


def test_what_a_method_draws_from_the_runs_seed_does_not_make_it_several():
    results = [result("shira", *cell, settings={"adapter.config.random_seed": cell[1]}) for cell in CELLS]
    results += [result("lora", *cell) for cell in CELLS]
    [study] = studies(results)
    assert {name: len(runs) for name, runs in study.methods.items()} == {"lora": 6, "shira": 6}


@pytest.mark.slow
def test_every_shipped_method_is_compared_with_every_other_under_one_protocol():
    names = [line.split()[0] for line in choices("adapter", "finetune").splitlines()]
    results = []
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        for name in (name for name in names if name != "peft"):
            for seed in range(2):
                run = result(name, "d/a", seed)
                config = compose("finetune", ["task=d/a", f"adapter={name}", f"seed={seed}"])
                settings = protocol(parse(config, FinetuneConfig))
                results.append(run | {"settings": settings, "steps": settings["steps"]})
    [study] = studies(results)
    assert set(study.methods) == set(names) - {"peft"}
    assert study.amiss == []


def test_scores_that_are_all_alike_can_be_drawn():
    results = [
        result(name, f"d/{task}", seed, s)
        for name in ("eva", "lora")
        for task, s in enumerate((0.52, 0.76, 0.1))
        for seed in range(3)
    ]
    [study] = studies(results)
    for figure in plots(study).values():
        to_png(figure)


def test_an_interval_that_ends_at_zero_is_drawn_whole():
    low, high = _spread([Estimate(0.3, 0.0, 0.6, 3), Estimate(0.5, None, None, 1)])
    assert low.tolist() == [0.3, 0.0]
    assert high.tolist() == [0.3, 0.0]


def test_an_improvement_that_is_the_same_wherever_one_looks_has_no_interval():
    for seeds in (1, 3):
        cells = [(f"d/{task}", seed) for task in range(4) for seed in range(seeds)]
        [study] = studies([result(name, *cell, s) for name, s in (("eva", 0.9), ("lora", 0.1)) for cell in cells])
        found = improvement(study, "eva", "lora")
        assert (found.mean, found.low, found.high) == (1.0, None, None)


def test_many_tasks_tell_two_methods_apart_where_a_few_runs_cannot():
    score = {"eva": 0.9, "lora": 0.1}
    [many] = studies([result(name, f"d/{task}", 0, s) for name, s in score.items() for task in range(20)])
    assert told_apart(many, "eva", "lora")
    [few] = studies([result(name, "d/a", seed, s) for name, s in score.items() for seed in range(3)])
    assert not told_apart(few, "eva", "lora")


def test_an_evaluation_that_does_not_say_whether_it_succeeded_is_no_point_of_the_curve():
    run = result(curve={25: 0.4, 50: 0.6})
    run["curve"]["25"]["success_rate"] = None
    [study] = studies([run, result("lora")])
    assert study.curve(*typed([run])) == [(0, 0.0), (50, 0.6), (100, 0.5)]


def test_methods_without_a_common_cell_are_not_compared():
    [study] = studies([result("eva", "d/a", 0), result("lora", "d/a", 1)])
    assert study.methods == {}
    assert "have no task and seed in common" in study.amiss[0]


def test_tasks_without_success_are_compared_by_normalised_score():
    results = [
        result(name, *cell, success, success_rate=None)
        for name, success in (("eva", 0.7), ("lora", 0.2))
        for cell in CELLS
    ]
    results.append(result("eva", "d/c", 0, success_rate=None, normalized_score=None))
    [study] = studies(results)
    assert study.score == "normalized_score"
    assert "eva: d/c, seed 0 left out: it has no normalized score" in study.amiss
    assert study.ranked() == ["eva", "lora"]


def test_a_run_without_the_success_that_others_of_its_task_have_is_left_out():
    results = [result(name, *cell) for name in ("eva", "lora") for cell in CELLS]
    results[0] |= {"success_rate": None}
    results.append(result("eva", "d/c", 0, success_rate=None, normalized_score=None))
    [study] = studies(results)
    task, seed = CELLS[0]
    assert study.score == "success_rate"
    assert f"eva: {task}, seed {seed} left out: it has no success rate" in study.amiss
    assert "eva: d/c, seed 0 left out: it has no success rate" in study.amiss


def test_an_interval_of_a_success_rate_ends_where_rates_do():
    results = [
        result(name, "d/a", seed, success) for name in ("eva", "lora") for seed, success in enumerate((0.9, 1.0))
    ]
    [study] = studies(results)
    assert study.estimate(study.scores("eva")).high == 1.0


def test_the_area_under_a_curve_is_its_mean_height():
    assert area([(0, 0.0), (100, 1.0)]) == pytest.approx(0.5)
    assert area([(0, 0.2), (50, 0.2), (200, 0.2)]) == pytest.approx(0.2)
    assert area([(0, 0.0), (50, 1.0), (100, 1.0)]) == pytest.approx(0.75)


def test_the_first_step_at_a_level_lies_on_the_line_between_two_evaluations():
    curve = [(0, 0.1), (50, 0.3), (100, 0.2), (150, 0.8)]
    assert steps_to(curve, 0.2) == pytest.approx(25)
    assert steps_to(curve, 0.5) == pytest.approx(125)
    assert steps_to(curve, 0.1) == 0
    assert steps_to(curve, 0.9) is None


def test_learning_curves_run_from_zero_shot_to_the_end_and_are_measured_by_full_fine_tuning():
    slow, fast = {25: 0.2, 50: 0.4, 75: 0.6}, {40: 0.8, 75: 0.8}
    results = [result("full", *cell, 0.8, curve=slow) for cell in CELLS]
    results += [result("eva", *cell, 0.8, curve=fast) for cell in CELLS]
    [study] = studies(results)
    assert dict(study.mean_curve("full")) == pytest.approx({0: 0.0, 25: 0.2, 50: 0.4, 75: 0.6, 100: 0.8})
    header, *_ = method_table(study).splitlines()
    half = [cell.strip() for cell in header.strip("|").split("|")].index("steps to half of full") - 1
    found = rows(method_table(study))
    assert (found["full"][half], found["full"][half + 1]) == ("50", "90")
    assert (found["eva"][half], found["eva"][half + 1]) == ("20", "36")
    assert study.areas("full")["d/a"] == pytest.approx([0.4] * 3)


def test_a_task_counts_the_same_in_the_curve_however_many_runs_it_has():
    cells = [("d/a", 0), ("d/a", 1), ("d/a", 2), ("d/b", 0)]
    results = [
        result(name, *cell, curve={50: 0.9 if cell[0] == "d/b" else 0.1}) for name in ("full", "eva") for cell in cells
    ]
    [study] = studies(results)
    assert dict(study.mean_curve("eva"))[50] == pytest.approx(0.5)


@pytest.mark.parametrize(("rates", "half"), [([None], "50"), ([1e-3], "50"), ([1e-3, 1e-4], "–")])
def test_curves_are_measured_by_full_fine_tuning_if_there_is_one(rates, half):
    """One: whatever its learning rate, and whatever another protocol's has."""
    results = [
        result("full", *cell, 0.8, curve={50: 0.4}, settings={"training.learning_rate": rate})
        for rate in rates
        for cell in CELLS
    ]
    results += [result("eva", *cell, 0.8, curve={50: 0.4}) for cell in CELLS]
    results += [result("full", *cell, 0.8, settings={"steps": 7, "training.learning_rate": 1e-2}) for cell in CELLS]
    study = next(study for study in studies(results) if "eva" in study.methods)
    header, *_ = method_table(study).splitlines()
    column = [cell.strip() for cell in header.strip("|").split("|")].index("steps to half of full") - 1
    assert rows(method_table(study))["eva"][column] == half
    assert any("measured by none" in sentence for sentence in study.amiss) == (len(rates) > 1)


def test_no_curve_is_measured_by_a_reference_that_ends_at_nothing():
    results = [result(name, *cell, -0.5, curve={50: -0.7}, before=-0.9) for name in ("full", "eva") for cell in CELLS]
    for group in (group for run in results for group in (run, run["zero_shot"], *run["curve"].values())):
        group |= {"success_rate": None, "success_at_end": None}
    [study] = studies(results)
    header, *_ = method_table(study).splitlines()
    half = [cell.strip() for cell in header.strip("|").split("|")].index("steps to half of full") - 1
    assert rows(method_table(study))["eva"][half] == "–"


def test_a_method_without_its_curves_is_named():
    results = [result(name, *cell, curve={50: 0.4}) for name in ("full", "eva") for cell in CELLS]
    results[-1]["curve"] = {}
    [study] = studies(results)
    assert study.amiss == ["eva: no learning curve, as not all of its runs have one"]


def test_labels_are_drawn_as_they_stand():
    settings = {"adapter.config.target_modules": r".*\.q$|\w+\.v$"}
    results = [result("lora", *cell, settings=own) for own in (settings, {}) for cell in CELLS]
    results += [result("lora", *cell, settings={"adapter.config.target_modules": "x" * 400}) for cell in CELLS]
    [study] = studies(results)
    for figure in plots(study).values():
        to_png(figure)
    assert len({line.replace(r"\|", "").count("|") for line in method_table(study).splitlines()}) == 1


def test_however_many_methods_there_are_each_has_its_line():
    results = [
        result(f"m{number:02}", *cell, settings={"steps": steps})
        for number in range(70)
        for steps in (50, 100)
        for cell in CELLS[:1]
    ]
    [axes] = varied_plot(varied(results)).axes
    assert len(axes.get_legend().get_texts()) == 70


def test_tasks_of_one_name_in_two_domains_keep_their_domains():
    results = [result(name, task, 0) for name in ("eva", "lora") for task in ("dmc/reacher", "gym/reacher")]
    assert rows(task_table(studies(results)[0]))["method"][:2] == ["dmc/reacher", "gym/reacher"]


def test_a_table_of_tasks_has_a_column_each():
    results = [result(name, *cell, 0.5 + (cell[0] == "d/b") / 4) for name in ("eva", "lora") for cell in CELLS]
    found = rows(task_table(studies(results)[0]))
    assert found["method"] == ["a", "b", "mean"]
    assert found["eva"] == ["0.50 [0.50, 0.50]", "0.75 [0.75, 0.75]", "0.625"]


def test_values_of_a_number_are_compared_on_the_tasks_and_seeds_that_all_of_them_have():
    results = [
        result("eva", *cell, 0.1 * cell[1] + rank / 10, settings={"adapter.rank": rank})
        for cell in CELLS
        for rank in (2, 4)
    ]
    task, seed = CELLS[-1]
    found = varied(results[:-1])  # without the last cell of rank 4
    assert found.left_out == f"{task} seed {seed}"
    means = [estimate.mean for _, estimate in found.lines["eva"]]
    assert means == [pytest.approx((0.3 + 0.25) / 2), pytest.approx((0.5 + 0.45) / 2)]
    assert f"has them: {task} seed {seed}." in document(comparison(results[:-1]))
    apart = [result("eva", "d/a", seed, settings={"adapter.rank": 2 + seed}) for seed in range(2)]
    assert varied(apart) is None


def test_a_pareto_front_holds_what_nothing_cheaper_reaches():
    points = {"none": (0, 0.1), "cheap": (10, 0.8), "worse": (20, 0.7), "equal": (30, 0.8), "dear": (40, 0.9)}
    assert pareto_front(points) == ["none", "cheap", "dear"]


def test_studies_that_differ_in_one_number_make_a_line_a_method():
    results = [
        result(name, *cell, rank / 10, settings={"adapter.rank": rank})
        for name in ("eva", "lora")
        for cell in CELLS
        for rank in (2, 4, 8)
    ]
    found = varied(results)
    assert found.setting == "adapter.rank"
    assert [(value, estimate.mean) for value, estimate in found.lines["lora"]] == [
        (2, pytest.approx(0.2)),
        (4, pytest.approx(0.4)),
        (8, pytest.approx(0.8)),
    ]
    assert found.left_out == ""
    assert varied([*results, result(settings={"adapter.rank": 2, "base": "other"})]) is None
