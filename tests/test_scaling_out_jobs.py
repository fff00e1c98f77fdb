"""Jobs in real processes: what ranks agree on, what they lose when they do not, and what a launch leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launcher_jobs
import pytest
import scaling_jobs
import torch
from torch import nn

from mixprec_lab import models
from mixprec_lab.memory import training_memory
from mixprec_lab.scaling_out import (
    LaunchTimeout,
    RankFailed,
    checkpoints,
    gradients,
    launch,
    launcher,
    simulate_reduction,
)
from mixprec_lab.scaling_out.checkpoints import differing

SECONDS = 240.0  # a machine that does ten other things at once


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    return list(models.digits())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def both(data, folder) -> list[dict]:
    """What two ranks made of every job."""
    arguments = {"folder": folder, "data": data}
    return launch(scaling_jobs.everything, arguments=arguments, timeout=SECONDS, show="nothing").results


def test_digests_tell_equal_tensors_from_different_ones(both):
    assert [r["agree"] for r in both] == [[True, False]] * 2


# -- data parallel -----------------------------------------------------------------------------------------------------


def test_ranks_hold_the_same_weights_and_learn_in_every_way(both):
    for name, result in both[0]["ddp"].items():
        assert result["same"] and torch.equal(result["weights"], both[1]["ddp"][name]["weights"])
        assert result["last_loss"] < 0.8 * result["first_loss"]


def test_two_ranks_train_like_one_process_on_the_whole_batch(both, data):
    digits, model = models.Digits(*data), models.transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(3):
        batch = torch.randint(len(digits.train_labels), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert both[0]["ddp"]["FP32"]["losses"][:3] == pytest.approx(losses, rel=1e-5)


def test_under_ddp_an_infinity_of_one_rank_is_skipped_by_all(both):
    for r in both:
        assert (r["overflow"]["skipped"], r["overflow"]["log2_scale"], r["overflow"]["same"]) == (1, 15.0, True)
    assert torch.isfinite(both[0]["overflow"]["weights"]).all()


def test_our_bf16_hook_is_torchs(both):
    for r in both:
        assert torch.equal(r["hooks"]["ours"], r["hooks"]["torch's"])
        assert not torch.equal(r["hooks"]["ours"], r["hooks"]["none"])
        error = (r["hooks"]["ours"] - r["hooks"]["none"]).norm() / r["hooks"]["none"].norm()
        assert 2.0**-12 < error < 2.0**-7


# -- scalers over shards -----------------------------------------------------------------------------------------------


def test_a_rank_that_skips_alone_leaves_the_others(both):
    alone = [r["skipping"]["each for itself"] for r in both]
    assert [a["stepped"] for a in alone] == [[True] * 4, [True, False, True, True]]
    assert [a["log2_scale"] for a in alone] == [16.0, 15.0]
    # afterwards one rank scales by S and one by S / 2; rank 0 divides the sum by S, rank 1 by S / 2
    assert 0.1 < alone[0]["gradient_error"] < 1 and 0.2 < alone[1]["gradient_error"] < 2
    assert alone[1]["gradient_error"] == pytest.approx(2 * alone[0]["gradient_error"], rel=0.3)


def test_a_common_scaler_skips_on_all_ranks_and_keeps_gradients_right(both):
    together = [r["skipping"]["all together"] for r in both]
    for t in together:
        assert (t["stepped"], t["log2_scale"]) == ([True, False, True, True], 15.0)
        assert t["gradient_error"] < 1e-5
    assert torch.equal(together[0]["weights"], together[1]["weights"])


def test_a_rank_that_cannot_check_tells_the_others_before_it_raises(both):
    first, last = (r["refusal"] for r in both)
    assert "none of the 1 parameters has a gradient" in last["error"]
    assert first == {"stepped": False, "error": "", "weight": 1.0, "scale": 2.0}


def test_fsdp2_reduces_the_check_of_either_scaler(both):
    for r in both:
        assert set(r["sharded"]["overflow"].values()) == {"every rank skipped"}


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def test_reduce_dtype_follows_param_dtype_unless_it_is_said(both):
    for r in both:
        s = r["sharded"]
        seen = {k: (s[k]["computes"], s[k]["gradient"], s[k]["reduced_in_bf16"]) for k in s if k != "overflow"}
        assert seen == {
            "nothing": ("FP32", "FP32", False),
            "param BF16": ("BF16", "FP32", True),
            "param BF16, reduce FP32": ("BF16", "FP32", False),
        }


def test_each_rank_keeps_what_the_calculator_says(both):
    for r in both:
        for name in ("nothing", "param BF16", "param BF16, reduce FP32"):
            measured = r["sharded"][name]
            bill = training_memory(measured["parameters"], "autocast", zero_stage=3, world_size=2)
            assert measured["bytes"]["weights"] == bill.weights
            assert measured["bytes"]["gradients"] == bill.gradients
            assert measured["bytes"]["moments"] == bill.moments
            assert measured["bytes"]["masters"] == 0


# -- what travels ------------------------------------------------------------------------------------------------------


def test_two_ranks_add_as_the_simulation_says(both):
    x = gradients(2, 4096)
    for name, wire in (("FP32", "fp32"), ("BF16", "bf16"), ("FP16", "fp16")):
        for r in both:
            assert torch.equal(r["wire"]["sums"][name], simulate_reduction(x, wire, "ring"))


@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="the order of the additions is gloo's, here NCCL adds")
def test_four_ranks_add_in_the_order_of_the_ring():
    ranks = launch(launcher_jobs.sums, 4, arguments={"sizes": [64, 4096]}, timeout=SECONDS, show="nothing").results
    for name, wire in (("FP32", "fp32"), ("BF16", "bf16"), ("FP16", "fp16")):
        for size in (64, 4096):
            expected = simulate_reduction(gradients(4, size), wire, "ring")
            assert not torch.equal(expected, simulate_reduction(gradients(4, size), wire, "tree"))
            assert all(torch.equal(r[f"{name} {size}"], expected) for r in ranks)


def test_gloo_adds_no_fp8(both):
    if not torch.cuda.is_available():
        assert both[0]["wire"]["sums"]["E4M3"] == "refused, Invalid scalar type"


def test_gathered_bytes_are_what_quantizing_on_the_spot_gives(both):
    for r in both:
        assert r["wire"]["exact"] is True
        assert torch.equal(r["wire"]["gathered"], both[0]["wire"]["gathered"])
        assert (r["wire"]["bytes"], r["wire"]["gathered"].numel()) == (1032, 1024)


def test_scales_part_without_a_common_amax_and_not_with_it(both):
    for r in both:
        own, common = r["wire"]["scales"].values()
        assert own["differ"] == 2  # input and gradient; the weight is the same everywhere
        assert common["differ"] == 0
        assert common["by_rank"][0][0] == min(own["by_rank"][rank][0] for rank in (0, 1))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_fresh_pair_of_ranks_goes_on_bit_for_bit(both, data, folder):
    saved, end = both[0]["checkpoints"]["saved"], both[0]["checkpoints"]["end"]
    assert saved["scaler"]["scale"] != 2.0**16 and differing(saved, end)
    assert any("amax_history" in name for name in saved["tensors"])
    arguments = {"folder": folder, "data": data}
    for r in launch(checkpoints.resume, arguments=arguments, timeout=SECONDS, show="nothing").results:
        assert differing(r["loaded"], saved) == []
        assert differing(r["end"], end) == []


def test_one_rank_loads_what_two_have_saved(both, data, folder):
    arguments = {"folder": folder, "data": data, "more": 0}
    (alone,) = launch(checkpoints.resume, 1, arguments=arguments, timeout=SECONDS, show="nothing").results
    assert differing(alone["loaded"], both[0]["checkpoints"]["saved"]) == []


def test_a_difference_of_one_bit_is_named():
    a = {"tensors": {"w": torch.ones(3)}, "scaler": {"scale": 1.0}, "steps": 2}
    b = {"tensors": {"w": torch.ones(3), "v": torch.ones(1)}, "scaler": {"scale": 2.0}, "steps": 2}
    b["tensors"]["w"][2] = 1 + 2.0**-23
    assert differing(a, a) == [] and differing(a, b) == ["v", "w", "scaler"]


# -- the launcher ------------------------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.is_file() and "State:\tZ" in status.read_text())  # a zombie has ended


def wait_until(true, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_rank_that_raises_first_is_named_and_all_output_is_shown(capsys):
    with pytest.raises(RankFailed, match="rank 1 of 2 failed first: ZeroDivisionError: the cause") as caught:
        launch(launcher_jobs.raises, arguments={"rank": 1}, timeout=SECONDS)
    assert (caught.value.rank, caught.value.code) == (1, 1)
    assert 'raise ZeroDivisionError("the cause")' in str(caught.value) and "_worker.py" not in str(caught.value)
    assert capsys.readouterr().out == "[rank 0] before the error\n[rank 1] before the error\n"


def test_a_rank_that_is_killed_is_the_cause():
    with pytest.raises(RankFailed, match="rank 1 of 2 was ended by signal SIGKILL and raised nothing") as caught:
        launch(launcher_jobs.dies, timeout=SECONDS)
    assert (caught.value.rank, caught.value.code) == (1, -signal.SIGKILL)


def test_a_rank_that_does_not_end_is_shown_where_it_waits_and_is_gone(tmp_path):
    job = {"module": "launcher_jobs", "function": "waits_for_ever"}
    torch.save({"folder": str(tmp_path)}, tmp_path / "arguments.pt")
    (tmp_path / "job.json").write_text(str(job).replace("'", '"'))
    run = launcher._Run(tmp_path, 2, "nothing")
    with launcher._started(tmp_path, 2) as ranks:
        wait_until(lambda: run.texts("out") == ["asleep\n"] * 2)
        told = r"within 0.01 s, rank 0, 1 did not(?s:.*)in waits_for_ever(?s:.*)rank 1:(?s:.*)in waits_for_ever"
        with pytest.raises(LaunchTimeout, match=told):
            run.wait(ranks, timeout=0.01)
    assert not any(is_alive(process.pid) for process in ranks)


def test_nothing_is_left_when_the_launcher_is_killed(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import launcher_jobs; from mixprec_lab.scaling_out import launch\n"
        f"launch(launcher_jobs.waits_for_ever, arguments={{'folder': {str(tmp_path)!r}}}, timeout=600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        owner.kill()
        owner.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(map(is_alive, pids)), seconds=10)


def test_a_script_is_launched_and_shown_as_it_writes(tmp_path, capsys):
    path = tmp_path / "job.py"
    path.write_text(
        "import os\nfrom mixprec_lab.scaling_out import process_group\n"
        "if __name__ == '__main__':\n"
        "    print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n"
        "    print('no end of line', end='')\n"
    )
    done = launch(path, 1, timeout=SECONDS, show="live")
    assert (done.results, done.outputs, done.errors) == ([None], ["rank 0 of 1\nno end of line"], [""])
    assert capsys.readouterr().out == "[rank 0] rank 0 of 1\n[rank 0] no end of line\n"


def test_a_result_that_does_not_travel_is_an_error():
    with pytest.raises(RankFailed, match=r"TypeError: expected numbers.*PosixPath as the result\['value'\]\[0\]"):
        launch(launcher_jobs.returns_a_path, 1, timeout=SECONDS)


def test_a_job_runs_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "mixprec_lab.scaling_out.wire"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("E4M3 gathered: 1,032 bytes for 1,024 values, exact: True") == 2


# -- with NCCL ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_job_runs_with_nccl(data, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; with one GPU the jobs run on one rank, with two or more on two")
    processes = min(2, torch.cuda.device_count())
    arguments = {"folder": str(tmp_path), "data": data}
    results = launch(scaling_jobs.on_gpus, processes, arguments=arguments, timeout=SECONDS, show="nothing").results
    for r in results:
        assert r["device"].startswith("cuda") and r["wire"]["exact"]
        assert all(way["same"] for way in r["ddp"].values())
        together = r["skipping"]["all together"]
        assert (together["stepped"], together["log2_scale"]) == ([True, False, True, True], 15.0)
        assert set(r["sharded"]["overflow"].values()) == {"every rank skipped"}
        assert r["sharded"]["param BF16"]["reduced_in_bf16"] and not r["sharded"]["nothing"]["reduced_in_bf16"]
    fresh = launch(checkpoints.resume, processes, arguments=arguments | {"more": 0}, timeout=SECONDS, show="nothing")
    for r in fresh.results:
        assert differing(r["loaded"], results[0]["checkpoints"]["saved"]) == []
