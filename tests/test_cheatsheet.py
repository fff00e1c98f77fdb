"""The cheat sheet: every number and operator on it is the library's, its code runs, and paper holds it on one page."""

import re

import make_cheatsheet
import pytest
import torch
from conftest import HTML, ROOT
from markdown_it import MarkdownIt

from mixprec_lab.amp import rule_of
from mixprec_lab.bf16_vs_fp16 import get_hardware
from mixprec_lab.block_scaling import BlockScaling
from mixprec_lab.formats import FORMATS, FloatFormat
from mixprec_lab.fp8 import CurrentScaling, DelayedScaling
from mixprec_lab.fp8.recipes import format_of
from mixprec_lab.loss_scaling import get_rule, simulate_scaler
from mixprec_lab.memory import get_regime
from mixprec_lab.rounding import quantize

TEXT = (ROOT / "book" / "cheatsheet.md").read_text("utf-8")
SECTIONS = {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in TEXT.split("\n## ")[1:]}


def table(section: str) -> list[list[str]]:
    """The cells of a section's table without its head; powers as 2^-24, code without backticks."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return [[re.sub(r"<sup>(.*?)</sup>", r"^\1", cell).replace("`", "") for cell in row] for row in cells]


def prose(section: str) -> str:
    """What a section says beside its table, its code and its links."""
    lines = SECTIONS[section].split("```python")[0].splitlines() + SECTIONS[section].split("```\n")[-1].splitlines()
    kept = [line for line in lines if line and line[0] not in "|{→`"]
    return re.sub(r"<su[bp]>(.*?)</su[bp]>", r"^\1", " ".join(dict.fromkeys(kept)))


def short(x: float) -> str:
    """Three digits, as on the sheet: 6.10e-5."""
    text = f"{x:.3g}" if 1e-3 < x < 1e5 else f"{x:.2e}"
    return f"{x:g}" if x == int(x) < 1e5 else re.sub(r"e([+-])0?(\d+)", lambda m: f"e{m[1].strip('+')}{m[2]}", text)


def power(x: float) -> str:
    """A power of two as 2^-10."""
    exponent = torch.tensor(x, dtype=torch.float64).log2().item()
    assert exponent == int(exponent)
    return f"2^{int(exponent)}"


def losing_ratio(name: str, weight: float) -> int:
    """The power of two R from which on weight + weight/R is the weight again: at R - 1 it is not yet."""
    w, r = torch.tensor(weight, dtype=torch.float64), 1
    while quantize(w + quantize(w / r, name), name) != w:
        r *= 2
    assert quantize(w + quantize(w / (r - 1), name), name) != w
    return r


def name_of(fmt: FloatFormat) -> str:
    """E4M3 for FP8 E4M3."""
    return fmt.title.split()[-1]


def test_formats_are_those_of_the_library_and_the_ratio_is_found_by_rounding():
    names = {name_of(f): f for f in FORMATS.values()}
    for title, bits, largest, normal, least, gap, binades, ratio in table("Formats"):
        fmt = names[title]
        assert bits == f"1 + {fmt.exponent_bits} + {fmt.mantissa_bits}" and sum(map(int, bits.split(" + "))) == fmt.bits
        assert (largest, normal, least) == tuple(map(short, (fmt.largest, fmt.smallest_normal, fmt.smallest_subnormal)))
        assert (gap, int(binades)) == (power(fmt.eps), fmt.binades)
        found = losing_ratio(fmt.name, 1.0)
        assert ratio in (str(found), power(found))
    assert [row[0] for row in table("Formats")] == ["FP32", "TF32", "FP16", "BF16", "E4M3", "E5M2", "E2M1"]


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_just_below_two_a_weight_loses_from_about_twice_the_ratio(name):
    fmt = FORMATS[name]
    weight = torch.tensor(2 - fmt.eps, dtype=torch.float64)
    lost = [r for r in range(1, 2 * losing_ratio(name, 1.0) + 1) if quantize(weight - weight / r, name) == weight]
    assert lost and 1 - fmt.eps <= lost[0] / (2 * losing_ratio(name, 1.0)) <= 1


def test_the_edges_are_where_the_casts_have_them():
    half = torch.tensor([65519.99, 65520.0, 2.0**-25, 2.0**-25 * 1.001]).half()
    assert half.isinf().tolist() == [False, True, False, False] and (half == 0).tolist() == [False, False, True, False]
    assert "infinite from 65520 on and zero up to 2^-25" in prose("Formats")
    assert not FORMATS["fp8_e4m3"].has_inf and not FORMATS["fp4_e2m1"].has_inf and FORMATS["fp8_e5m2"].has_inf
    e8m0 = FORMATS["e8m0"]
    assert f"from {power(e8m0.smallest_normal)} to {power(e8m0.largest)}" in prose("Formats")


def test_the_step_runs_and_trains_and_its_order_is_right():
    code = re.search(r"```python\n(.*?)```", SECTIONS["The step"], re.DOTALL)[1]
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    names = {"torch": torch, "model": model, "x": torch.randn(64, 8), "y": torch.randn(64, 1),
             "optimizer": torch.optim.SGD(model.parameters(), lr=0.05), "loss_fn": torch.nn.functional.mse_loss,
             "scaler": torch.amp.GradScaler("cpu"), "clip_grad_norm_": torch.nn.utils.clip_grad_norm_}  # fmt: skip
    losses = []
    for _ in range(20):
        exec(compile(code.replace('"cuda"', '"cpu"'), "the step", "exec"), names)
        losses.append(names["loss"].item())
    assert losses[-1] < 0.9 * losses[0] and all(p.dtype == torch.float32 for p in model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert 1e-3 < norm <= 1.0001  # clipped after unscaling: before, 65536 times less


RULES = {"to 16 bits": "lower precision", "to FP32": "fp32", "as they are, FP32 result": "fp32 output",
         "to the widest among them": "widest", "as they are": "none", "refused": "banned"}  # fmt: skip


def test_autocast_treats_every_listed_operator_as_the_sheet_says():
    rows = table("Autocast on CUDA")
    assert {words for words, _ in rows} == set(RULES)
    for words, operators in rows:
        assert {op: rule_of(op, "cuda") for op in operators.split()} == dict.fromkeys(operators.split(), RULES[words])
    on_cpu = re.findall(r"`(\w+)`", SECTIONS["Autocast on CUDA"].split("On a CPU")[1])
    assert len(on_cpu) == 4 and {rule_of(op, "cpu") for op in on_cpu} == {"none"}
    assert all(rule_of(op, "cuda").startswith("fp32") for op in on_cpu)


def test_scalers_follow_the_rules_of_the_frameworks():
    for (title, first, halved, doubled, least), name in zip(
        table("Loss scaling"), ("torch", "deepspeed", "megatron"), strict=True
    ):
        rule = get_rule(name)
        assert (title, first) == ({"torch": "PyTorch"}.get(name, title), power(rule.init_scale))
        assert title.lower() in (name, "pytorch")
        assert halved == f"{rule.hysteresis} overflow{'s' * (rule.hysteresis > 1)}"
        assert doubled == f"{rule.window} clean steps" and rule.growth_factor == 2 and rule.backoff_factor == 0.5
        words = f"{rule.min_scale:g}" + ", then an error" * rule.raises_at_minimum if rule.min_scale else "none"
        assert least == words


def test_a_stable_run_skips_one_step_in_two_thousand():
    run = simulate_scaler(get_rule("torch"), [0.5] * 400_000)
    assert round(400_000 / run.skipped, -2) == 2000 and "skips 1 step in 2000" in prose("Loss scaling")


def test_remedies_cost_what_the_regimes_store():
    extra = {row[0]: int(row[1]) for row in table("Small updates")}
    pure = get_regime("bf16_pure")
    assert extra == {"FP32 master": get_regime("bf16_master").master, "stochastic rounding": 0,
                     "Kahan sum": get_regime("bf16_kahan").bytes_per_parameter - pure.bytes_per_parameter}  # fmt: skip


def test_a_second_moment_in_bf16_cannot_fall_at_999_and_can_at_95():
    every = torch.arange(128, 256, dtype=torch.float32).bfloat16()  # one binade
    assert torch.equal(every * 0.999, every) and bool((every * 0.95 < every).all())
    assert "= 0.999; with 0.95 it can" in prose("Small updates")


REGIMES = ("fp32", "bf16_master", "bf16_master_fp32_grad", "bf16_master_accumulate", "bf16_pure", "deepseek_v3")


def test_memory_is_the_sum_of_its_buffers():
    for (_, weight, gradient, master, moments, total, model), name in zip(
        table("Memory with Adam, bytes a parameter"), REGIMES, strict=True
    ):
        r = get_regime(name)
        gradients = [r.gradients, r.accumulated] if r.accumulated else [r.gradients]
        assert (weight, gradient) == (f"{r.weights:g}", " + ".join(f"{g:g}" for g in gradients))
        assert master == (f"{r.master:g}" if r.master else "–") and moments == " + ".join(f"{m:g}" for m in r.moments)
        assert (total, model) == (f"{r.bytes_per_parameter:g}", f"{7 * r.bytes_per_parameter:g}")
        parts = [weight, *gradient.split("+"), *moments.split("+"), "0" if master == "–" else master]
        assert sum(map(float, parts)) == float(total)
    assert get_regime("autocast").bytes_per_parameter == get_regime("fp32").bytes_per_parameter
    assert get_regime("te_fp8_bf16").copies == 2 and "adds 2 bytes of copies" in prose(
        "Memory with Adam, bytes a parameter"
    )


def test_recipes_have_these_blocks_scales_elements_and_bits():
    rows = {row[0]: row[1:] for row in table("FP8 and below")}
    for name, recipe in (("delayed", DelayedScaling()), ("current", CurrentScaling())):
        formats = [name_of(format_of(recipe.fp8_format, role)) for role in ("weight", "grad_output")]
        assert rows[name][0] == "tensor" and rows[name][2:] == [", ".join(formats), "8"]
    assert "Transformer Engine's defaults are the same but for the history: 1024." in DelayedScaling.__doc__
    assert rows["delayed"][1] == f"FP32, last {DelayedScaling().amax_history_len} amax (TE: 1024)"
    recipes = {"DeepSeek-V3": BlockScaling.deepseek(), "MXFP8": BlockScaling("mxfp8"), "MXFP4": BlockScaling("mxfp4"),
               "NVFP4": BlockScaling.nvfp4()}  # fmt: skip
    for name, recipe in recipes.items():
        inputs, weights = recipe.of("input"), recipe.of("weight")
        block = "×".join(map(str, inputs.block))
        if weights.block != inputs.block:
            block += f"; weights {'×'.join(map(str, weights.block))}"
        scale = name_of(inputs.scale) + " × one FP32" * inputs.second_level
        assert rows[name] == [block, scale, name_of(inputs.element), f"{inputs.bits_per_value:g}"]
    assert f"{FORMATS['fp8_e4m3'].largest:g} / amax for E4M3" in prose("FP8 and below")


def test_accelerators_have_these_units():
    for name, capability, *units in table("Matrix units"):
        entry = get_hardware(name)
        told = [".".join(map(str, entry.capability[0])) if entry.capability else "–"]
        told += ["yes" if unit in entry.features else "–" for unit in ("fp16_matrix", "bf16", "tf32")]
        told += [next((words for unit, words in (("fp8", "OCP"), ("fp8_fnuz", "FNUZ")) if unit in entry.features), "–")]
        blocks = [words for unit, words in (("fp8_blocks", "128"), ("mxfp8", "MXFP8"), ("nvfp4", "NVFP4"))
                  if unit in entry.features]  # fmt: skip
        assert [capability, *units] == [*told, ", ".join(blocks) or "–"], name


def test_clipping_before_unscaling_leaves_one_part_in_65536():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale((weight * torch.tensor([3.0, 4.0, 0.0, 0.0])).sum()).backward()
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    scaler.unscale_(optimizer)
    assert weight.grad.norm().item() == pytest.approx(1 / 65536, rel=1e-5)
    assert any("1/65536 after clipping to 1" in row[0] for row in table("Symptom and cause"))


def test_the_quoted_message_is_the_one_that_torch_raises():
    half = torch.nn.Linear(2, 1).half()
    optimizer, scaler = torch.optim.SGD(half.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(half(torch.ones(1, 2).half()).float().sum()).backward()
    (message,) = [row[0] for row in table("Symptom and cause") if row[0].startswith("Attempting")]
    with pytest.raises(ValueError, match=re.escape(message)):
        scaler.unscale_(optimizer)


CHECKED = {  # section -> every number of its prose and of the cells that no test above builds from the library
    "Formats": "1 2 16 65520 2^-25 4 3 8 0 2^-127 2^127",
    "The step": "32 16",
    "Autocast on CUDA": "16",
    "Loss scaling": "2 65520 1 2000",
    "Small updates": "16 2 0.999 0.95",
    "Memory with Adam, bytes a parameter": "8 16 2",
    "FP8 and below": "5 2 448 4 3",
    "Matrix units": "",
    "Symptom and cause": "",
}


def test_no_number_of_the_prose_is_unknown_to_these_tests():
    found = {}
    for section in SECTIONS:
        text = prose(section).replace("log^2", "log 2").replace("β^2", "β 2")
        found[section] = set(re.findall(r"2\^-?\d+|\d+(?:\.\d+)?", text))
    assert found.keys() == CHECKED.keys()
    assert {s: numbers - set(CHECKED[s].split()) for s, numbers in found.items()} == dict.fromkeys(CHECKED, set())


# The paper


def pages_of(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page(?![A-Za-z])", pdf))


def test_the_pdf_is_one_page_of_a4_and_the_same_every_time(tmp_path):
    for name in ("a.pdf", "b.pdf"):
        make_cheatsheet.write(tmp_path / name)
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert pages_of(pdf) == 1 and pdf == (tmp_path / "b.pdf").read_bytes()
    (box,) = re.findall(rb"/MediaBox \[([^\]]*)\]", pdf)
    assert [round(float(x) * 25.4 / 72) for x in box.split()] == [0, 0, 210, 297]


def words(made) -> str:
    """The text of flowables, in order, without spaces."""
    found = ""
    for piece in made:
        if hasattr(piece, "_content"):
            found += words(piece._content)
        elif hasattr(piece, "_cellvalues"):
            found += words(cell for row in piece._cellvalues for cell in row)
        else:
            found += piece.getPlainText() if hasattr(piece, "getPlainText") else "".join(piece.lines)
    return re.sub(r"\s", "", found)


def test_the_pdf_says_what_the_page_says_in_signs_that_its_fonts_have():
    make_cheatsheet.register_fonts()
    text = words(make_cheatsheet.flowables(TEXT))
    source = re.sub(r"\{\.screen-only\}\n(.+\n)+", "", TEXT)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(source)
    plain = [c.content for t in tokens if t.type == "inline" for c in t.children if c.type in ("text", "code_inline")]
    fences = [t.content for t in tokens if t.type == "fence"]
    assert sorted(text) == sorted(re.sub(r"\s", "", "".join(plain + fences)))
    face = make_cheatsheet.pdfmetrics.getFont("Sans").face
    assert [sign for sign in set(text) if ord(sign) not in face.charToGlyph] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "\n\nMore.\n" * 200, "expected sheet.md to fit on one page of A4, got [2-9] pages"),
        (lambda text: text + "\n- a list\n", "expected headings, paragraphs, tables and code in .*, got bullet_list"),
        (lambda text: text + "\n[a link](x.md)\n", "expected text, code, sub or sup in .*, got link_open"),
        (lambda text: text + "\n| " + "x" * 90 + " | b |\n|---|---|\n| 1 | 2 |\n", "expected a table of at most"),
        (lambda text: text + "\n```\n" + "x" * 120 + "\n```\n", "expected lines of code of at most"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_file(tmp_path, change, message):
    (tmp_path / "sheet.md").write_text(change(TEXT), "utf-8")
    with pytest.raises(ValueError, match=message):
        make_cheatsheet.write(tmp_path / "sheet.pdf", tmp_path / "sheet.md")
    assert not (tmp_path / "sheet.pdf").exists()


def test_the_site_has_the_pdf_and_the_deck_where_its_pages_link_to(open_page, tmp_path):
    for page, file in (("cheatsheet", "cheatsheet.pdf"), ("interview", "mixprec.apkg")):
        link = open_page(f"book/{page}.html").page.locator(f'a[href="{file}"]')
        assert link.count() == 1 and (HTML / "book" / file).is_file()
    make_cheatsheet.write(tmp_path / "now.pdf")
    assert (HTML / "book" / "cheatsheet.pdf").read_bytes() == (tmp_path / "now.pdf").read_bytes()


def test_the_page_prints_on_one_page_of_a4_with_nothing_cut_off(open_page):
    page = open_page("book/cheatsheet.html").page
    assert page.locator("section#cheat-sheet").evaluate("e => getComputedStyle(e).columnCount") == "auto"  # on a screen
    pdf = page.pdf(prefer_css_page_size=True)
    assert pages_of(pdf) == 1
    (box,) = set(re.findall(rb"/MediaBox \[([^\]]*)\]", pdf))
    assert [round(float(x) * 25.4 / 72) for x in box.split()] == [0, 0, 210, 297]
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 733, "height": 1062})  # A4 less the margins, in CSS pixels
    cut = """els => els.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))"""
    boxes = "section#cheat-sheet :is(pre, .pst-scrollable-table-container)"
    assert page.eval_on_selector_all(boxes, cut) == []
