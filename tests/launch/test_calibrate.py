"""What `launch.calibrate` tells about a policy; that it writes one is in `test_commands`."""

import re

import pytest
import synthetic

from early_exit.calibration import methods
from early_exit.settings.fields import rules
from early_exit.settings.sections import CalibrateSettings
from launch import calibrate

RECORDS = synthetic.records(600)


def told(**settings):
    return "\n".join(calibrate.told(methods.fit(RECORDS, CalibrateSettings(**settings)).provenance))


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


def test_every_setting_has_a_flag_but_what_is_drawn_and_how_much_is_read():
    flags = {flag.name for flag in calibrate.SETTINGS}
    assert flags == rules(CalibrateSettings).keys() - {"seed", "batches"}
