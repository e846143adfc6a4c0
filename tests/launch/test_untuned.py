"""`launch.generate` before anything is tuned, and what it says was saved."""

import re

TINY = "--config=configs/tiny.py"
ASKED = ("--raw", "--prompt=def def def def def", "--max_new_tokens=12")


def test_a_network_answers_without_a_run_and_says_what_was_saved(launch):
    checked = launch("generate", TINY, *ASKED, "--mode=verified")
    assert checked.returncode == 0, checked.stderr
    alone = launch("generate", TINY, *ASKED)
    assert alone.returncode == 0, alone.stderr
    assert checked.stdout.split("\n\n")[0] == alone.stdout.split("\n\n")[0]
    assert "tokens, verified: lookup, " in checked.stdout
    tokens, passes = map(int, re.findall(r"saved: (\d+) tokens in (\d+) passes", checked.stdout)[0])
    assert 0 < passes <= tokens
    assert "saved: 0% of the blocks that the full model runs" in alone.stdout


def test_something_has_to_be_named_that_answers(launch):
    done = launch("generate", *ASKED)
    assert done.returncode == 1 and "give --workdir, a run's folder, or --config" in done.stderr
    classifier = launch("generate", "--config=configs/digits_resnet.py", *ASKED)
    assert classifier.returncode == 1
    assert "this config holds a classifier; use launch.classify" in classifier.stderr
    missing = launch(
        "generate", "--config=configs/tiny.py", "--config.model.source=nowhere", *ASKED
    )
    assert missing.returncode == 1 and "nowhere" in missing.stderr
