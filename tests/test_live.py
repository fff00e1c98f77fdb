"""Exhibits in a kernel: numbers against the library, one answer a question, errors, freeing, traits for programs."""

import copy
import gc
import json
import threading
import weakref
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace

import ipywidgets
import pytest
import torch
import traitlets
from ipywidgets.embed import embed_data
from kernel_front import FAKE_KERNEL, entry_of, opened, state_of
from torch import nn
from widget_page import gradients

from mixprec_lab import models
from mixprec_lab.exhibits import LossScaleLab, _live
from mixprec_lab.exhibits._casts import CastCounts, cast_counts, compared
from mixprec_lab.exhibits._live import Tensors, between_cells, cast_path, place_of
from mixprec_lab.formats import FORMATS, classify, get_format
from mixprec_lab.loss_scaling import record_gradients

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
SIGNED = [name for name, fmt in FORMATS.items() if fmt.signed]


@pytest.fixture
def front(monkeypatch):
    """``front(exhibit_maker)`` -> (exhibit, its front end)."""
    return partial(opened, monkeypatch)


# ----------------------------------------------------------------------------------------------- casts on the device


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("tensor", gradients()["early"])
def test_the_counts_of_a_cast_are_those_of_classify(tensor, name):
    x, fmt = gradients()["early"][tensor], get_format(name)
    for k in (-3, 0, 1, 9, 40):
        s, found = classify(x, fmt, 2.0**k), cast_counts(x, fmt, 2.0**k)
        assert (found.flushed, found.overflowed, found.total) == (
            round(s.flushed * x.numel()), round(s.overflowed * x.numel()), x.numel()
        ), k  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]
)
def test_tensors_of_any_float_dtype_are_cast(dtype):
    x = gradients()["early"]["cloud"].to(dtype)
    s, found = classify(x.float(), "fp16", 2.0**6), cast_counts(x, get_format("fp16"), 2.0**6)
    assert (found.flushed, found.overflowed) == (round(s.flushed * 2000), round(s.overflowed * 2000))


def test_chunks_change_no_count(monkeypatch):
    x, fmt = gradients()["early"]["cloud"], get_format("fp8_e4m3")
    whole = cast_counts(x, fmt, 2.0**24)
    monkeypatch.setattr("mixprec_lab.exhibits._casts._CHUNK", {"cpu": 7})
    assert cast_counts(x, fmt, 2.0**24) == whole and whole.overflowed > 7


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e5m2", "fp8_e4m3"])
def test_what_overflows_becomes_what_torch_makes_of_it(name):
    fmt = get_format(name)
    found = cast_counts(torch.tensor([1.0, -fmt.largest]), fmt, 4.0)
    expected = torch.tensor([fmt.largest * 4]).to(fmt.torch_dtype).float().item()
    assert found.overflowed == 1 and (found.becomes == str(expected) or float(found.becomes) == expected)


def test_counts_that_differ_from_the_prediction_are_named():
    found = CastCounts(10, 3, 1, "inf", "cpu")
    assert compared(found, 3, 1).endswith(
        "3 of 10 elements become zero, 1 overflow (the first becomes inf), as predicted."
    )
    assert compared(found, 4, 1).endswith("; predicted were 4 and 1.")


def test_an_empty_tensor_is_not_cast():
    with pytest.raises(ValueError, match="at least one element"):
        cast_counts(torch.empty(0), get_format("fp16"))


def test_the_path_names_device_and_cast():
    assert cast_path(CPU, get_format("fp16")) == "cpu: native float16 cast"
    assert cast_path(CPU, get_format("fp8_e4m3")) == "cpu: float8_e4m3fn cast in software"
    assert cast_path(CPU, get_format("fp6_e3m2")) == "cpu: emulated FP6 E3M2"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SIGNED)
def test_a_gpu_casts_as_classify_says(name):
    for x in gradients()["early"].values():
        s, found = classify(x, name, 2.0**9), cast_counts(x.cuda(), get_format(name), 2.0**9)
        assert (found.flushed, found.overflowed) == (round(s.flushed * len(x)), round(s.overflowed * len(x)))
        assert found.path.startswith("cuda: ")


def test_a_device_is_chosen_by_name_by_the_tensors_or_by_pick(monkeypatch):
    monkeypatch.setenv("MIXPREC_DEVICE", "meta")
    assert place_of(None).type == "meta" and place_of("cpu") == CPU
    assert place_of(None, [torch.ones(1), torch.ones(1, device="meta")]).type == "meta"
    with pytest.raises(ValueError, match=r"expected a device of this machine .* got 'tpu9'"):
        place_of("tpu9")


# --------------------------------------------------------------------------------------------- questions and answers


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e5m2", "fp8_e4m3"])
def test_an_answer_holds_what_the_library_computes_for_the_state_asked(front, name):
    lab, page = front(lambda: LossScaleLab(gradients(), device="cpu"))
    for number, k in enumerate((0, 11, 40), start=7):
        answer = page.ask(state_of(lab, tensor="cloud", stage="late", format=name, log2_scale=k), number)
        twin = LossScaleLab(gradients(), "late", "cloud", name, k)
        x, s = gradients()["late"]["cloud"], classify(gradients()["late"]["cloud"], name, 2.0**k)
        assert (answer["kind"], answer["view"], answer["id"], answer["device"]) == ("answer", "v", number, "cpu")
        assert answer["texts"] == twin.result() and answer["elements"] == x.numel() and answer["milliseconds"] > 0
        flushed, over = round(s.flushed * x.numel()), round(s.overflowed * x.numel())
        assert answer["said"].startswith(f"Cast for real: {flushed} of 2000 elements become zero, {over} overflow")
        assert answer["said"].endswith("as predicted.") and answer["path"] == cast_path(CPU, get_format(name))
        assert (lab.log2_scale, lab.stage, lab.answer["texts"]) == (k, "late", answer["texts"])
        json.dumps(answer)


def test_a_question_sends_nothing_back_but_its_answer(front):
    lab, page = front(lambda: LossScaleLab(gradients()))
    question = {"kind": "compute", "view": "v", "id": 1, "state": state_of(lab, log2_scale=5)}
    page.line.handle_msg({"content": {"data": {"method": "custom", "content": question}}, "buffers": []})
    assert [data["method"] for _, data in page.line.sent] == ["custom"]  # an update would move the slider back


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"log2_scale": 99}, "TraitError"),
        ({"format": "fp99"}, "expected format to be one of"),
        ({"recordings": {}}, "KeyError"),
    ],
)
def test_an_error_is_answered_changes_nothing_and_is_gone_with_the_next_answer(front, state, words):
    lab, page = front(lambda: LossScaleLab(gradients(), log2_scale=3))
    before = state_of(lab)
    wrong = page.ask(state_of(lab) | state, 4)
    assert words in wrong["error"] and wrong["id"] == 4 and "texts" not in wrong
    assert state_of(lab) == before and lab.answer == {}
    assert "error" not in page.ask(state_of(lab), 5)


def test_a_failing_computation_is_told_to_the_page(front, monkeypatch):
    lab, page = front(lambda: LossScaleLab(gradients()))

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("mixprec_lab.exhibits.loss_scale_lab.cast_counts", fail)
        assert page.ask(state_of(lab))["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert "error" not in page.ask(state_of(lab), 2)


def test_other_messages_are_left_to_others(front):
    _, page = front(lambda: LossScaleLab(gradients()))
    assert page.tell({"kind": "anywidget-command"}) == []


def test_a_prediction_is_not_given_away_by_the_kernel(front):
    lab, page = front(lambda: LossScaleLab(gradients()))
    answer = page.ask(state_of(lab, phase="predict"))
    assert answer["said"] == "" and answer["texts"]["flushed-now"] == "?"


def test_beside_a_running_cell_work_waits_for_the_main_thread(monkeypatch):
    waiting, done = [], []
    kernel = SimpleNamespace(io_loop=SimpleNamespace(add_callback=waiting.append))
    monkeypatch.setattr(_live, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    between_cells(lambda: done.append("at once"))
    thread = threading.Thread(target=lambda: between_cells(lambda: done.append("later")))
    thread.start()
    thread.join()
    assert done == ["at once"] and len(waiting) == 1
    waiting[0]()
    assert done == ["at once", "later"]


# ------------------------------------------------------------------------------------------------------------ models


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(16, 1, 8, 8, generator=generator), torch.arange(16) % 10


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_model_is_run_under_autocast_with_the_loss_times_the_scale(front, name):
    model, loss = models.convnet(), nn.functional.cross_entropy
    before = copy.deepcopy(model.state_dict())
    lab, page = front(lambda: LossScaleLab(model, batch(), loss, device="cpu"))
    assert lab.recordings["stages"] == ["this batch"] and lab.device == "Recorded on cpu."
    dtype = get_format(name).torch_dtype
    for k in (0, 40):
        tensor = "0 Conv2d: activations"
        answer = page.ask(state_of(lab, format=name, tensor=tensor, log2_scale=k))
        with torch.autocast("cpu", dtype):
            record = record_gradients(model, *batch(), loss, loss_scale=2.0**k)
        h = record.activations["0"]
        broken = any(h.infinite + h.nan for h in record.weights.values())
        assert f"{100 * h.zero / h.total:.2f} % of this gradient is zero" in answer["said"].replace(" 0 %", " 0.00 %")
        assert ("the step is skipped" in answer["said"]) == broken == (name == "fp16" and k == 40)
        assert answer["path"] == f"cpu: {str(dtype)[6:]} autocast" and answer["elements"] == h.total
    assert all(torch.equal(v, before[key]) for key, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_formats_that_autocast_has_not_are_answered_from_the_exact_histogram(front):
    lab, page = front(lambda: LossScaleLab(models.convnet(), batch(), nn.functional.cross_entropy))
    answer = page.ask(state_of(lab, format="fp8_e4m3"))
    assert answer["said"] == "" and answer["path"] == "cpu: exact histogram"


def test_refresh_sees_the_model_and_the_tensors_as_they_are_now():
    model = models.convnet()
    lab = LossScaleLab(model, batch(), nn.functional.cross_entropy, device="cpu")
    old = lab.recordings["tensors"]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    lab.refresh()
    fresh = LossScaleLab(model, batch(), nn.functional.cross_entropy, device="cpu")
    assert lab.recordings == fresh.recordings and lab.recordings["tensors"] != old
    x = torch.ones(8)
    held = LossScaleLab({"x": x})
    x.zero_()
    held.refresh()
    assert held.result()["zero-now"] == "100 %"


@pytest.mark.parametrize("arguments", [(), (torch.ones(1),), ((torch.ones(1), torch.ones(1)),), ("ab", len)])
def test_a_model_without_batch_or_loss_is_refused(arguments):
    with pytest.raises(TypeError, match=r"expected LossScaleLab\(model, \(inputs, targets\), loss_fn\)"):
        LossScaleLab(nn.Linear(1, 1), *arguments)


def test_float64_gradients_are_taken_in_fp32():
    x = torch.rand(100, dtype=torch.float64) / 3
    assert LossScaleLab({"x": x}).result() == LossScaleLab({"x": x.float()}).result()


# ----------------------------------------------------------------------------------------------------------- freeing


def test_close_lets_go_of_tensors_and_models(front):
    x, model = torch.rand(1000), models.convnet()
    seen = [weakref.ref(x), weakref.ref(model)]
    first, page = front(partial(LossScaleLab, {"x": x}))
    second = LossScaleLab(model, batch(), nn.functional.cross_entropy)
    page.ask(state_of(first))
    second.recompute()
    del x, model, page
    gc.collect()
    assert all(ref() is not None for ref in seen)
    first.close()
    second.close()
    gc.collect()
    assert all(ref() is None for ref in seen)
    for lab in (first, second):
        with pytest.raises(RuntimeError, match="closed and has let go"):
            lab.recompute()


def test_a_copy_on_the_device_lives_while_a_view_is_open(front):
    lab, page = front(lambda: LossScaleLab({"x": torch.rand(1000)}, device="cpu"))
    lab._tensors.place = torch.device("meta")  # a device that is not the tensor's
    copied = weakref.ref(lab._tensors.at(("recorded", "x")))
    assert copied() is lab._tensors.at(("recorded", "x"))
    lab._views = {"a", "b"}
    page.tell({"kind": "gone", "view": "a"})
    assert copied() is not None
    page.tell({"kind": "gone", "view": "b"})
    gc.collect()
    assert copied() is None and ("recorded", "x") in lab._tensors


def test_a_tensor_on_the_device_is_the_readers_own():
    x = torch.rand(4, requires_grad=True)
    held = Tensors({"x": x}, CPU)
    assert held.at("x").data_ptr() == x.data_ptr() and list(held) == ["x"]


@pytest.mark.gpu
@needs_gpu
def test_closing_the_output_frees_gpu_memory(front):
    before = torch.cuda.memory_allocated()
    lab, page = front(lambda: LossScaleLab({"x": torch.rand(10**7, device="cuda")}))
    answer = page.ask(state_of(lab))
    assert torch.cuda.memory_allocated() >= before + 4 * 10**7
    page.tell({"kind": "gone", "view": "v"})
    assert torch.cuda.memory_allocated() == before
    assert page.ask(state_of(lab))["said"] == answer["said"]  # a view that opens again finds the tensor again
    lab.close()
    assert torch.cuda.memory_allocated() == before


# ------------------------------------------------------------------------------------- ordinary widgets to a program


def test_a_program_observes_controls_and_answers(front):
    lab, page = front(lambda: LossScaleLab(gradients()))
    moves, answers = [], []
    lab.observe(lambda change: moves.append(change["new"]), "log2_scale")
    lab.observe(lambda change: answers.append(change["new"]["texts"]["verdict"]), "answer")
    for k in (3, 9):
        page.ask(state_of(lab, log2_scale=k))
    assert moves == [3, 9] and answers == [LossScaleLab(gradients(), log2_scale=k).result()["verdict"] for k in (3, 9)]


def test_two_exhibits_can_be_linked_and_laid_out():
    first, second = LossScaleLab(gradients()), LossScaleLab(gradients(), tensor="edges")
    link = ipywidgets.link((first, "log2_scale"), (second, "log2_scale"))
    one_way = ipywidgets.dlink((first, "format"), (second, "format"))
    first.log2_scale, first.format = 12, "bf16"
    assert (second.log2_scale, second.format) == (12, "bf16")
    second.log2_scale, second.format = 4, "fp16"
    assert (first.log2_scale, first.format) == (4, "bf16")
    link.unlink()
    one_way.unlink()
    assert ipywidgets.HBox([first, second]).children == (first, second)
    browser = ipywidgets.jslink((first, "log2_scale"), (second, "log2_scale"))
    assert browser.source == (first, "log2_scale")


def test_answers_are_no_part_of_the_saved_state(front):
    lab, page = front(lambda: LossScaleLab(gradients(), name="lab"))
    saved = embed_data(views=[lab])["manager_state"]["state"][lab.model_id]["state"]
    page.ask(state_of(lab))
    assert "answer" not in saved and saved == embed_data(views=[lab])["manager_state"]["state"][lab.model_id]["state"]
    assert traitlets.HasTraits.has_trait(lab, "answer") and "answer" not in lab.keys


# ------------------------------------------------------------------------- the page's side, with the test as a kernel


@pytest.fixture
def live_page(pages):
    lab = LossScaleLab(gradients(), name="lab")
    visit = pages([lab])
    visit.page.evaluate(FAKE_KERNEL, json.loads(json.dumps(entry_of(lab))))
    return visit, visit.page.locator("#live")


def answered(visit, number, **more):
    content = {
        "kind": "answer", "id": number, "device": "cpu", "path": "cpu: native float16 cast", "elements": 2000,
        "milliseconds": 1.25, "said": "Said by the test.", "texts": {"flushed-count": "a text of the test"},
    }  # fmt: skip
    visit.page.evaluate("(a) => live.answer({ view: live.sent[0].view, ...a })", content | more)


def test_a_page_without_a_kernel_says_nothing_of_one(pages):
    visit = pages([LossScaleLab(gradients(), name="lab")])
    assert visit.page.locator("[data-live]").count() == 0 and visit.problems == {}


def test_the_kernel_is_asked_one_question_at_a_time_and_for_the_newest_state_only(live_page):
    visit, root = live_page
    sent = lambda: visit.page.evaluate("live.sent")  # noqa: E731
    assert [(q["kind"], q["state"]["log2_scale"]) for q in sent()] == [("compute", 0)]
    slider = root.get_by_label("Loss scale S")
    for k in range(1, 31):
        slider.fill(str(k))
    assert len(sent()) == 1  # thirty moves wait behind one question
    assert root.locator("[data-field=verdict]").inner_text().startswith("The largest safe S")  # the page has answered
    stale = sent()[0]["id"]
    before = root.locator("[data-field=flushed-count]").inner_text()
    answered(visit, stale)
    assert [q["state"]["log2_scale"] for q in sent()] == [0, 30]
    assert root.locator("[data-field=flushed-count]").inner_text() == before  # a stale answer is not shown
    answered(visit, stale)  # nor asked after again
    assert len(sent()) == 2
    answered(visit, sent()[1]["id"])
    assert root.locator("[data-field=flushed-count]").inner_text() == "a text of the test"
    assert root.locator("[data-live=said]").inner_text() == "Said by the test."
    line = "Computed by the kernel on cpu, native float16 cast: 2000 values in 1.3 ms."
    assert root.locator("[data-live=line]").inner_text() == line
    assert len(sent()) == 2


def test_answers_for_another_view_are_not_shown(live_page):
    visit, root = live_page
    answered(visit, 1, view="another")
    assert root.locator("[data-live=said]").is_hidden()


def test_an_error_stands_in_the_exhibit_until_the_next_good_answer(live_page):
    visit, root = live_page
    answered(visit, 1, error="RuntimeError: <img src=x onerror=alert(1)> out of memory", texts=None)
    error = root.locator("[data-live=error]")
    assert error.inner_text() == "RuntimeError: <img src=x onerror=alert(1)> out of memory"
    assert (
        error.get_attribute("role") == "alert" and "could not compute" in root.locator("[data-live=line]").inner_text()
    )
    assert root.locator("[data-field=verdict]").inner_text().startswith("The largest safe S")
    root.get_by_label("Loss scale S").fill("3")
    answered(visit, 2)
    assert error.inner_text() == "" and root.locator("[data-live=said]").inner_text() == "Said by the test."


def test_an_old_answer_does_not_stay_beside_a_new_state(live_page):
    visit, root = live_page
    line, words = root.locator("[data-live=line]"), root.locator("[data-live=said]")
    assert line.inner_text() == "Computed in your browser; no kernel has answered yet."
    answered(visit, 1)
    visit.page.clock.install(time=datetime(2026, 1, 1, tzinfo=UTC))
    visit.page.clock.pause_at(datetime(2026, 1, 2, tzinfo=UTC))
    root.get_by_label("Loss scale S").fill("3")
    visit.page.clock.run_for(399)
    assert line.inner_text().startswith("Computed by the kernel") and words.inner_text() == "Said by the test."
    visit.page.clock.run_for(1)
    assert line.inner_text() == "Computed in your browser; the kernel is still at work on this state."
    assert words.inner_text() == "\u2026"
    answered(visit, visit.page.evaluate("live.sent.at(-1).id"))
    assert line.inner_text().startswith("Computed by the kernel") and words.inner_text() == "Said by the test."
    visit.page.clock.run_for(1000)
    assert line.inner_text().startswith("Computed by the kernel")


def test_a_move_by_the_program_asks_the_kernel_too(live_page):
    visit, _ = live_page
    answered(visit, 1)
    visit.page.evaluate("live.model.set('log2_scale', 17)")
    assert visit.page.evaluate("live.sent.at(-1).state.log2_scale") == 17


def test_a_view_that_closes_says_so_and_leaves_no_listener(live_page):
    visit, _ = live_page
    visit.page.evaluate("live.end()")
    last = visit.page.evaluate("live.sent.at(-1)")
    assert last == {"kind": "gone", "view": visit.page.evaluate("live.sent[0].view")}
    assert visit.page.evaluate("live.held()") == 0
