"""Records the tuned exits on held-out text and fits the thresholds that decoding uses.

    python -m launch.calibrate --workdir=runs/smollm2 --epsilon=0.95 --confidence=margin

Writes records.npz and policy.json.
"""

from absl import flags

from early_exit import assemble
from early_exit.evaluation import exits, run
from early_exit.metrics import table
from launch import common

CONFIDENCE = flags.DEFINE_string("confidence", None, "Score to threshold; the config's if absent.")
EPSILON = flags.DEFINE_float(
    "epsilon", None, "Share of leavers that must agree with the full model; the config's if absent."
)


def main(argv):
    common.no_arguments(argv)
    tuned = assemble.load_tuned(common.workdir(), common.CONFIG.value)
    for name, flag in (("confidence", CONFIDENCE), ("epsilon", EPSILON)):
        if flag.value is not None:
            tuned.config.calibrate[name] = flag.value
    policy, records = run.calibrate(tuned)
    rows = [
        (row["exit"], row["agreement"], row["coverage"], float(threshold))
        for row, threshold in zip(exits.summary(records), policy.thresholds, strict=False)
    ]
    print(table(rows, header=("exit", "agreement", "coverage at 95 %", "threshold")))
    if policy.provenance["unreachable"]:
        print(
            f"exits {policy.provenance['unreachable']} never reach "
            f"{policy.provenance['epsilon']:.0%} agreement: no token will leave there"
        )
    print(f"policy in {common.workdir() / assemble.POLICY}")


if __name__ == "__main__":
    common.run(main)
