"""Checkpoints that are wrapped, damaged, or another model's: loaded right, or refused by name, and nothing between."""

import re
from collections import Counter

import bad_checkpoints
import pytest
import torch

from backbones import BackboneError
from backbones.weights import load_weights


def outcome(case, folder):
    """ "right" or "refused"; else "silent", "raw", "half", "misnamed" or "refused though good", with the reason."""
    source = case.make(folder)
    model = bad_checkpoints.build(case.family, **case.options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_weights(model, source)
    except BackboneError as error:
        kept = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        if not kept or hasattr(model, "load_report"):
            return "half", str(error)
        if case.truth is not None:
            return "refused though good", str(error)
        named = re.search(r"state dict|does not fit|" + re.escape(str(folder)), str(error))
        return ("refused", "") if named else ("misnamed", str(error))
    except Exception as error:  # whatever comes out raw is what is looked for
        return "raw", f"{type(error).__name__}: {error}"
    if case.truth is None:
        return "silent", str(model.load_report)
    truth = bad_checkpoints.build(case.family, **case.options)
    truth.load_state_dict(case.truth())
    images = torch.randn(1, model.in_chans, 64, 64)
    with torch.inference_mode():
        equal = all(torch.equal(ours, theirs) for ours, theirs in zip(model(images), truth(images), strict=True))
    return ("right", "") if equal else ("silent", "its maps are not those of the weights in it")


@pytest.mark.slow
def test_no_checkpoint_is_taken_in_silence_or_by_half(tmp_path):
    cases = bad_checkpoints.all_cases()
    counts, wrong = Counter(), []
    for number, case in enumerate(cases):
        (folder := tmp_path / str(number)).mkdir()
        kind, reason = outcome(case, folder)
        counts[case.kind, kind] += 1
        if kind not in ("right", "refused"):
            wrong.append(f"{case.kind}, {case.family}, {case.name}: {kind}, {reason[:300]}")
    print(f"\n{len(cases)} checkpoints")
    for (group, kind), count in sorted(counts.items()):
        print(f"  {group:10} {kind:8} {count}")
    assert len(cases) >= 200
    assert not wrong, "\n".join(wrong)
