"""Single faults, planted one by one in good data sets of six layouts: named, repaired and told, or harmless."""

import re
import shutil
import warnings
from collections import Counter

import bad_data
import pytest

from backbones.errors import InputError

pytest.importorskip("rasterio", reason="plants multi-band TIFF, by the extra [large]")
FAULTS = bad_data.all_faults()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folder and content of a good data set of each layout."""
    found = {}
    for layout, write in bad_data.WRITERS.items():
        root = tmp_path_factory.mktemp(layout) / "data"
        write(root)
        found[layout] = root, bad_data.load(layout, root)
    return found


def outcome(fault, good, place):
    """ "refused", "told" or "right"; else "silent", "raw" or "misnamed", with the reason."""
    source, truth = good[fault.layout]
    root = place / "data"
    shutil.copytree(source, root)
    fault.plant(root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = bad_data.load(fault.layout, root)
        except InputError as error:
            named = re.search(fault.says, str(error), re.DOTALL)
            return ("refused", "") if named else ("misnamed", str(error))
        except Exception as error:  # whatever comes out raw is what is looked for
            return "raw", f"{type(error).__name__}: {error}"
    told = "\n".join(str(warning.message) for warning in caught)
    if re.search(fault.says, told, re.DOTALL):
        return "told", ""
    if bad_data.equal(found, truth):
        return "right", ""
    return "silent", told or "no warning"


@pytest.mark.slow
def test_no_bad_data_set_is_taken_in_silence(good, tmp_path):
    counts, wrong = Counter(), []
    for number, fault in enumerate(FAULTS):
        kind, reason = outcome(fault, good, tmp_path / str(number))
        counts[fault.layout, kind] += 1
        if kind not in ("refused", "told", "right"):
            wrong.append(f"{fault.layout}, {fault.name}: {kind}, {reason[:300]}")
        shutil.rmtree(tmp_path / str(number))
    print(f"\n{len(FAULTS)} bad data sets")
    for (layout, kind), count in sorted(counts.items()):
        print(f"  {layout:9} {kind:8} {count}")
    assert len(FAULTS) >= 200
    assert not wrong, "\n".join(wrong)
