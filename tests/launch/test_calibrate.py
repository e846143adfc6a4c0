"""What `launch.calibrate` tells about a policy; that it writes one is in `test_commands`."""

import re

import pytest
import synthetic

from early_exit.calibration import methods
from early_exit.calibration.methods import Settings
from early_exit.evaluation import run
from early_exit.settings.overrides import ConfigDict
from launch import calibrate

RECORDS = synthetic.records(600)


def told(**settings):
    return "\n".join(calibrate.told(methods.fit(RECORDS, Settings(**settings)).provenance))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epsilon": 0.9}, r"9\d\.\d% of these agree, mean depth \d\.\d\d, cost 0\.\d\d of going"),
        ({"epsilon": 0.9}, "so it is on these records; methods that promise it for new data: ltt"),
        (
            {"method": "ltt", "alpha": 0.2},
            r"disagreement among all ≤ 0\.2 with probability 0\.9: found 0\.1\d+, at most 0\.\d+, "
            "on 420 units of the kind group",
        ),
        (
            {"method": "ltt", "alpha": 0.001},
            "disagreement among all ≤ 0.001 cannot be shown on 420 units of the kind group; "
            "without a single loss it would take 2302",
        ),
        ({"method": "ltt", "alpha": 0.001}, r"nothing leaves at exits \[2, 4, 6\]"),
        ({"method": "search", "budget": 4.0}, "mean depth 4.00|mean depth 3.9"),
        ({"abstain": 0.1}, r"9\d\.\d% are answered; \d+\.\d% of the answers are wrong"),
    ],
)
def test_what_a_policy_keeps_is_told(settings, sentence):
    assert re.search(sentence, told(**settings))


def test_settings_come_from_the_config_but_for_the_flags():
    config = ConfigDict({"calibrate": {"method": "ltt", "alpha": 0.2, "batches": 3}})
    assert run.settings_of(config) == Settings(method="ltt", alpha=0.2)
    assert run.settings_of(config, alpha=0.1, delta=0.2) == Settings("ltt", alpha=0.1, delta=0.2)
    with pytest.raises(ValueError, match="calibrate has no such setting.*'alhpa'"):
        run.settings_of(ConfigDict({"calibrate": {"alhpa": 0.2, "batches": 3}}))


def test_every_setting_has_a_flag_but_the_seed():
    flags = {flag.name for flag in calibrate.SETTINGS}
    assert flags == {field for field in Settings.__dataclass_fields__ if field != "seed"}
