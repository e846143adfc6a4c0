"""Is a better calibrated score a better score to leave by? A temperature for each head, or none.

    python -m experiments.calibration.temperatures --records=runs/records/news.npz --epsilon=0.9

Needs records made with temperatures in view, see `experiments.calibration.record`.
"""

from pathlib import Path

from absl import app, flags

from early_exit.calibration import methods
from early_exit.calibration.records import Records
from early_exit.runs.metrics import table
from early_exit.settings.sections import CalibrateSettings

RECORDS = flags.DEFINE_string("records", None, "File of records.", required=True)
EPSILON = flags.DEFINE_float("epsilon", 0.95, "Agreement of those who leave.")
CONFIDENCES = ("max_prob", "margin")


def main(argv):
    del argv
    records = Records.load(Path(RECORDS.value))
    found = {}
    for confidence in CONFIDENCES:
        for temperature in (False, True):
            settings = CalibrateSettings(
                epsilon=EPSILON.value, confidence=confidence, temperature=temperature
            )
            found[confidence, temperature] = methods.fit(records, settings)
    with_it = found[CONFIDENCES[0], True]
    errors = with_it.provenance["temperature"]
    columns = (
        records.exit_depths.tolist(),
        with_it.temperatures.tolist(),
        errors["error_before"],
        errors["error_after"],
    )
    header = ("exit", "temperature", "calibration error before", "after")
    print(table(list(zip(*columns, strict=True)), header=header) + "\n")
    rows = [
        (
            confidence,
            "fitted" if temperature else "none",
            *(policy.provenance[name] for name in ("coverage", "agreement", "mean_cost")),
        )
        for (confidence, temperature), policy in found.items()
    ]
    print(table(rows, header=("score", "temperatures", "leave early", "agree", "cost")))


if __name__ == "__main__":
    app.run(main)
