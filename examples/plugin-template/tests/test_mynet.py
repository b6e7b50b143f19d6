"""The conformance kit of dense-backbones, a test for each backbone and check."""

from backbones import list_backbones
from backbones.testing import check_plugin, parametrize_backbones


@parametrize_backbones(list_backbones(plugin="mynet"))
def test_contract(name, check):
    check(name)


def test_plugin():
    failed = [result for result in check_plugin("mynet", slow=False) if result.outcome == "failed"]
    assert not failed, failed
