"""The selector: no hole in the table, no claim without a source, and no recommendation the hardware cannot run."""

import inspect
import itertools
import json
import re

import pytest
import torch

from mixprec_lab.bf16_vs_fp16 import (
    HARDWARE,
    RULES,
    SOURCES,
    TASKS,
    PrecisionSelector,
    bf16_support,
    cpu_flags,
    detect_hardware,
    get_hardware,
    get_task,
    hardware,
    recommend,
    tables,
)
from mixprec_lab.bf16_vs_fp16.hardware import FEATURES
from mixprec_lab.bf16_vs_fp16.rules import LIST_FIELDS, SINGLE_FIELDS

#: (forward format in training, any task but RL; with speed first; matrix units for FP8), written down by hand
EXPECTED = {
    "p100": ("fp32", "fp16", False),
    "v100": ("fp16", "fp16", False),
    "t4": ("fp16", "fp16", False),
    "a100": ("bf16", "bf16", False),
    "a10": ("bf16", "bf16", False),
    "rtx30": ("bf16", "bf16", False),
    "rtx40": ("bf16", "bf16", True),
    "rtx50": ("bf16", "bf16", True),
    "l4": ("bf16", "bf16", True),
    "l40s": ("bf16", "bf16", True),
    "h100": ("bf16", "bf16", True),
    "h200": ("bf16", "bf16", True),
    "b200": ("bf16", "bf16", True),
    "b300": ("bf16", "bf16", True),
    "gb200": ("bf16", "bf16", True),
    "mi250": ("bf16", "bf16", False),
    "mi300x": ("bf16", "bf16", True),
    "mi355x": ("bf16", "bf16", True),
    "tpu_v3": ("bf16", "bf16", False),
    "tpu_v4": ("bf16", "bf16", False),
    "tpu_v5e": ("bf16", "bf16", False),
    "tpu_v5p": ("bf16", "bf16", False),
    "tpu_v6e": ("bf16", "bf16", False),
    "gaudi2": ("bf16", "bf16", True),
    "gaudi3": ("bf16", "bf16", True),
    "cpu_amx": ("bf16", "bf16", False),
    "cpu": ("fp32", "fp32", False),
    "apple": ("fp32", "fp32", False),
}
TASK_NAMES = {
    "llm_pretraining", "fine_tuning", "lora", "rl_fine_tuning", "vision_cnn", "vit", "diffusion", "speech_rnn", "gan",
    "recommender", "inference",
}  # fmt: skip
VALUES = {
    "forward": {"fp16", "bf16", "fp32"},
    "accumulation": {"fp32"},
    "master": {"fp32", "fp32 adapters only", "none"},
    "optimizer_state": {"fp32", "bf16 moments", "8-bit moments", "none"},
    "reduction": {"fp32", "fp16, scaled", "none"},
    "loss_scaling": {"dynamic", "none"},
    "tf32": {"on", "off", "not a switch", "no hardware"},
}
PAIRS = list(itertools.product(EXPECTED, sorted(TASK_NAMES), ("stability", "speed")))


def test_the_tables_hold_the_hardware_and_tasks_of_the_course():
    assert set(HARDWARE) == set(EXPECTED) and set(TASKS) == TASK_NAMES


@pytest.mark.parametrize("name", EXPECTED)
def test_every_task_on_every_hardware_has_a_complete_recommendation_it_can_run(name):
    safe, fast, has_fp8 = EXPECTED[name]
    for task, priority in itertools.product(TASK_NAMES, ("stability", "speed")):
        found = recommend(name, task, priority=priority)
        values = found.as_dict()
        where = f"{name}, {task}, {priority}: {values}"
        assert set(values) == {*SINGLE_FIELDS, *LIST_FIELDS}, where
        for field, decision in found.decisions():
            assert decision.value and decision.reason and decision.source in SOURCES.values(), (field, where)
            assert "{" not in decision.value + decision.reason, where  # everything filled in
        for field, allowed in VALUES.items():
            assert values[field] in allowed, (field, where)
        assert found.keep_fp32, where
        training, forward, features = task != "inference", values["forward"], HARDWARE[name].features
        assert values["backward"] == (forward if training else "none"), where
        assert (values["loss_scaling"] == "dynamic") == (training and forward == "fp16"), where
        assert forward == "fp32" or forward in features or name == "apple", where
        assert ("no" not in values["fp8"].split()) <= has_fp8, where
        assert (values["tf32"] == "on") <= ("tf32" in features and priority == "speed"), where
        assert (values["optimizer_state"] == "fp32") >= (training and priority == "stability"), where
        for field in ("master", "optimizer_state", "reduction"):
            assert (values[field] == "none") == (not training), (field, where)
        if training and task != "rl_fine_tuning":
            assert forward == (safe if priority == "stability" else fast), where


def test_every_rule_and_every_hardware_names_a_source_and_every_source_is_used():
    used = {rule.source for rule in RULES} | {entry.source for entry in HARDWARE.values()}
    assert used == set(SOURCES)
    for source in SOURCES.values():
        assert source.title and re.fullmatch(r"20\d\d(-(0[1-9]|1[0-2]))?", source.date), source
        assert source.url.startswith("https://") or source.key == "own-tests", source
    assert all(rule.value and rule.reason for rule in RULES)


def test_rules_ask_only_for_facts_that_exist_and_every_rule_speaks_somewhere():
    facts = set(FEATURES) | {f"hardware:{h}" for h in HARDWARE} | {"priority:stability", "priority:speed"}
    facts |= {f"forward:{f}" for f in ("fp16", "bf16", "fp32")} | set().union(*(t.features for t in TASKS.values()))
    for rule in RULES:
        assert rule.needs | rule.lacks <= facts and rule.tasks <= TASK_NAMES, rule
        assert rule.field in (*SINGLE_FIELDS, *LIST_FIELDS), rule
    spoken = {d for pair in PAIRS for _, d in recommend(pair[0], pair[1], priority=pair[2]).decisions()}
    said = {(d.value, d.source.key) for d in spoken}
    for rule in RULES:
        values = {rule.value.format(forward=f) for f in ("fp16", "bf16", "fp32")}
        assert any((value, rule.source) in said for value in values), f"never spoken: {rule}"
    assert all(entry.features <= set(FEATURES) for entry in HARDWARE.values())


def test_the_tables_alone_give_the_same_answer():
    """An interpreter of the exported JSON, written again: what the exhibit does in the browser."""
    data = json.loads(json.dumps(tables()))

    def answer(hardware_entry: dict, task: dict, priority: str) -> dict:
        facts = {*hardware_entry["features"], *task["features"], f"hardware:{hardware_entry['name']}"}
        facts.add(f"priority:{priority}")
        out = {}
        for field in data["single_fields"] + data["list_fields"]:
            found = []
            for rule in data["rules"]:
                named = not rule["tasks"] or task["name"] in rule["tasks"]
                holds = facts.issuperset(rule["needs"]) and not facts.intersection(rule["lacks"])
                if rule["field"] == field and named and holds:
                    found.append(rule["value"].replace("{forward}", out.get("forward", "")))
            out[field] = found if field in data["list_fields"] else found[0]
            if field == "forward":
                facts.add(f"forward:{out['forward']}")
        return out

    for entry, task, priority in itertools.product(data["hardware"], data["tasks"], ("stability", "speed")):
        assert answer(entry, task, priority) == recommend(entry["name"], task["name"], priority=priority).as_dict()


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A800-SXM4-80GB", "a100"), ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla T4", "t4"), ("Tesla P100-PCIE-16GB", "p100"), ("NVIDIA A10G", "a10"), ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 3090", "rtx30"), ("NVIDIA GeForce RTX 4060 Laptop GPU", "rtx40"),
        ("NVIDIA GeForce RTX 4080 SUPER", "rtx40"), ("NVIDIA GeForce RTX 5060 Ti", "rtx50"), ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA GH200 480GB", "h200"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("NVIDIA GB200", "gb200"),
        ("NVIDIA GB300", "b300"), ("AMD Instinct MI250X", "mi250"), ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI355X", "mi355x"), ("TPU v4", "tpu_v4"), ("TPU v5 lite", "tpu_v5e"), ("TPU v5p", "tpu_v5p"),
        ("Gaudi 3", "gaudi3"), ("Apple M3 Max", "apple"), ("CPU with AMX", "cpu_amx"), ("cpu", "cpu"),
        (" A100 ", "a100"),
    ],
)  # fmt: skip
def test_names_as_torch_reports_them_are_understood(name, entry):
    assert get_hardware(name).name == entry == recommend(name, "gan").hardware.name


@pytest.mark.parametrize("entry", HARDWARE.values(), ids=lambda entry: entry.name)
def test_titles_and_keys_mean_their_own_entry(entry):
    assert get_hardware(entry.title) is get_hardware(entry.name) is entry


@pytest.mark.parametrize(
    "name", ["NVIDIA RTX A1000", "NVIDIA A40", "Quadro RTX 4000", "NVIDIA GeForce RTX 2080 Ti", ""]
)
def test_a_gpu_that_is_not_in_the_table_is_not_taken_for_another(name):
    with pytest.raises(KeyError, match="unknown hardware"):
        get_hardware(name)


def test_an_unknown_name_is_answered_with_close_matches_and_the_list():
    with pytest.raises(KeyError) as caught:
        recommend("H10O")
    told = caught.value.args[0]
    assert "did you mean h100" in told and all(name in told for name in HARDWARE)
    with pytest.raises(KeyError) as caught:
        recommend("h100", "lora tuning")
    assert "unknown task 'lora tuning'" in caught.value.args[0] and "recommender" in caught.value.args[0]


def test_other_bad_input_is_refused():
    for bad in (lambda: get_hardware(100), lambda: get_task(None), lambda: recommend(7), lambda: recommend("t4", 7)):
        with pytest.raises(TypeError, match="expected the name"):
            bad()
    with pytest.raises(ValueError, match="'stability' or 'speed'"):
        recommend("h100", priority="safety")


@pytest.mark.parametrize(
    ("alias", "name"), [("LLM", "llm_pretraining"), ("resnet", "vision_cnn"), ("RL", "rl_fine_tuning")]
)
def test_tasks_have_aliases(alias, name):
    assert get_task(alias) is TASKS[name] is get_task(TASKS[name].title.upper())


def test_the_text_names_every_decision_and_its_source():
    found = recommend("h100", "llm")
    for field, decision in found.decisions():
        assert f"{field.replace('_', ' ')}" in str(found) and decision.value in str(found)
        assert f"{decision.reason}\n    [{decision.source.title}, {decision.date}]" in found.explain()


# -------------------------------------------------------------------------------- the note's selector


@pytest.mark.parametrize("hardware_name", ["A100", "B200", "RTX 4090", "T4", "H100"])
@pytest.mark.parametrize("model", ["CNN", "LLM", "ViT"])
def test_the_notes_interface_answers_where_the_note_returned_nothing(model, hardware_name):
    answer = PrecisionSelector.recommend_precision(model, hardware_name)
    assert list(answer) == ["forward", "backward", "optimizer", "loss_scaling", "reason"] and all(answer.values())
    assert answer["backward"] == answer["forward"]  # there is no FP32 backward of a BF16 forward pass
    chosen = recommend(hardware_name, model)
    assert answer["reason"] == chosen.forward.reason and answer["loss_scaling"] == chosen.loss_scaling.value


def test_speed_instead_of_stability_is_a_priority():
    fast = PrecisionSelector().recommend_precision("CNN", "P100", stability_priority=False)
    assert (fast["forward"], PrecisionSelector.recommend_precision("CNN", "P100")["forward"]) == ("fp16", "fp32")


def test_what_papers_settle_is_recommended():
    assert recommend("h200", "rl").forward.value == "fp16"  # Qi et al. 2025
    assert recommend("tpu_v4", "rl").forward.value == "bf16"  # no fast FP16, no scaler
    assert recommend("h100", "llm").fp8.value == "128-element blocks"  # DeepSeek-V3
    assert recommend("h100", "cnn").fp8.value == "no"
    assert (
        recommend("b200", "llm").fp8.value == "MXFP8"
        and recommend("b200", "llm", priority="speed").fp8.value == "NVFP4"
    )
    assert "fp8_fnuz" in HARDWARE["mi300x"].features and "fp8_fnuz" not in HARDWARE["mi355x"].features


# -------------------------------------------------------------------------------- this machine


def pretend(monkeypatch, name: str, capability: tuple[int, int], native: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)


def test_auto_is_the_detected_machine_and_says_so():
    found = recommend("auto", "vit")
    assert found.hardware is detect_hardware().hardware and detect_hardware().reason in found.why_hardware
    assert found == recommend(task="vit") and "auto" in str(found)


def test_a_gpu_is_found_by_name_then_by_capability_then_not_at_all(monkeypatch):
    pretend(monkeypatch, "NVIDIA H200", (9, 0))
    assert detect_hardware().hardware.name == "h200" and "torch reports" in str(detect_hardware())
    pretend(monkeypatch, "NVIDIA A40", (8, 6))
    assert detect_hardware().hardware.name == "a10" and "compute capability 8.6" in detect_hardware().reason
    pretend(monkeypatch, "NVIDIA Xavier", (7, 2))
    with pytest.raises(KeyError, match="capability"):
        detect_hardware()


def test_capabilities_of_amd_gpus_are_not_nvidias(monkeypatch):
    pretend(monkeypatch, "AMD Radeon", (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(KeyError):
        detect_hardware()


def test_native_bf16_is_told_from_emulated(monkeypatch):
    pretend(monkeypatch, "Tesla T4", (7, 5), native=False)
    assert torch.cuda.is_bf16_supported() and bf16_support() == "emulated"
    pretend(monkeypatch, "NVIDIA A100-SXM4-40GB", (8, 0))
    assert bf16_support() == "native"


def test_torch_counts_emulation_unless_told_not_to():
    assert inspect.signature(torch.cuda.is_bf16_supported).parameters["including_emulation"].default is True


@pytest.mark.parametrize(
    ("flags", "entry", "support"),
    [
        ({"avx512f", "amx_bf16"}, "cpu_amx", "native"),
        ({"avx512_bf16"}, "cpu_amx", "native"),
        ({"avx2"}, "cpu", "emulated"),
    ],
)
def test_a_cpu_is_known_by_its_flags(monkeypatch, flags, entry, support):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
    assert detect_hardware().hardware.name == entry and bf16_support() == support


def test_mps_is_found_and_says_nothing_about_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert detect_hardware().hardware.name == "apple" and bf16_support() == "unknown"


def test_cpu_flags_are_read_from_x86_and_arm(tmp_path):
    x86, arm, empty = tmp_path / "x86", tmp_path / "arm", tmp_path / "empty"
    x86.write_text("processor : 0\nflags\t\t: fpu avx512_bf16 amx_bf16\n\nprocessor : 1\nflags\t\t: other\n")
    arm.write_text("processor : 0\nFeatures\t: fp asimd bf16\n")
    empty.write_text("processor : 0\n")
    assert cpu_flags(x86) == {"fpu", "avx512_bf16", "amx_bf16"}
    assert cpu_flags(arm) == {"fp", "asimd", "bf16"}
    assert cpu_flags(empty) == cpu_flags(tmp_path / "absent") == frozenset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_here_is_in_the_table_and_its_bf16_is_told():
    found = detect_hardware()
    major, _ = torch.cuda.get_device_capability()
    assert ("bf16" in found.hardware.features) == (bf16_support() == "native")
    assert torch.version.hip or (major >= 8) == (bf16_support() == "native")
