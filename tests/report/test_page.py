import html.parser
import json
import re
import subprocess
import sys

import pytest

from early_exit import policy as policies
from early_exit.report import page


class Page(html.parser.HTMLParser):
    """What a page shows and what it would load."""

    VOID = {"meta", "br", "img", "link", "input"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.open, self.words = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "action", "data", "srcset")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)


def save_rest(workdir):
    lines = [{"step": step, "loss": 1.0, "loss/exit_6": 1.0} for step in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"seed": 3, "tune": {"loss": "kl", "weights": [], "steps": 96}}
    (workdir / "config.json").write_text(json.dumps(config))


def test_a_page_needs_nothing_beside_itself(write_run):
    workdir = write_run()
    save_rest(workdir)
    path = page.write(workdir)
    assert path == workdir / "report.html"
    shown = Page(path)
    assert all(address.startswith("#") for address in shown.addresses)
    assert not {"link", "img", "iframe"} & set(shown.tags)
    assert shown.tags.count("script") == 2  # what the explorer has, and does
    assert not re.search(r"@import|url\((?!#)", path.read_text(encoding="utf-8"))
    assert shown.tags.count("svg") == 3


def test_everything_measured_is_on_the_page(write_run):
    def change(evaluation):
        evaluation["policy"]["provenance"] |= {"positions": 16311, "data": "a" * 64}

    workdir = write_run(change)
    save_rest(workdir)
    shown = Page(page.write(workdir)).text.replace("\xa0", " ")
    for words in (
        "tiny==1.0",
        "exits after blocks 6 and 18",
        "the policy ltt 0.05, lossy decoding ran 24.5 blocks per token on average and wrote",
        "ε 0.8, lossy 75.0 1.50× 1.10 s 88.1 % 19.0",  # decoding
        "ltt 0.05, deferred 55.0 1.10× 1.41 s 97.1 % 26.5",
        "ltt 0.05, verified: exits + lookup 85.0 1.70× 1.00 s 100.0 % 46.0",
        "verified: lookup 90.0 1.80× 0.96 s 100.0 % 40.0",
        "it was 1.02 times as fast with verified: exits , 1.70 times as fast with verified",
        "verified: exits + lookup (40.0 % of the tokens proposed by earlier text), 1.80 times",
        "verified: lookup (50.0 % of the tokens proposed by earlier text).",
        "drafts that were not kept included; the full model runs 30",
        "18 3.100 44.0 % 37.0 % 22.0 %",  # exits
        "6 never 18 0.8750",  # thresholds
        "method ltt alpha 0.05 positions 16311 data aaaaaaaaaaaa…",
        "KL(full ‖ exit)",
        "seed 3",
        "weights –",
        "134,515,008 parameters",
    ):
        assert words in shown


def test_text_of_model_and_settings_cannot_become_markup(write_run):
    attack = "</div><script>alert('x')</script><img src=x onerror=alert(1)>&lt;"

    def change(evaluation):
        evaluation["samples"][0] |= {"prompt": attack, "pieces": [attack, "<", "script>"]}
        evaluation["explorer"]["confidence"] = evaluation["explorer"]["words"]["1"] = attack
        evaluation["explorer"]["answers"][1] |= {"prompt": attack, "pieces": [attack, "<!--"]}
        evaluation["model"]["source"] = evaluation["text"] = evaluation["left_out"] = attack
        evaluation["policy"]["provenance"]["method"] = attack

    workdir = write_run(change)
    save_rest(workdir)
    (workdir / "config.json").write_text(json.dumps({"data": {"source": attack}, attack: 1}))
    shown = Page(page.write(workdir))
    assert "img" not in shown.tags and shown.tags.count("script") == 2
    assert shown.text.count("alert('x')") >= 6  # shown, at all those places, as text


def test_text_keeps_its_lines_and_spaces(write_run):
    def change(evaluation):
        evaluation["samples"][0]["pieces"] = ["if x:\n", "    ", "return\n"]

    path = page.write(write_run(change))
    assert re.search(r">if x:\n</span><span[^>]*>    </span>", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("speed", "said"),
    [
        (60.0, "60.0 tokens a second instead of 50.0: 1.20 times as fast"),
        (50.2, "no faster (1.00 times the speed)"),
        (40.0, "slower , 0.80 times the speed. Trying the exits cost more"),
    ],
)
def test_the_result_is_said_as_it_is(write_run, speed, said):
    def change(evaluation):
        rows = evaluation["decoding"]["rows"]
        rows[1] |= {"tokens_per_second": speed, "speedup": speed / 50}

    shown = Page(page.write(write_run(change))).text
    assert said in shown.replace("\xa0", " ")
    assert "fastest" not in shown


@pytest.mark.parametrize("chosen", ["epsilon 0.8", "ltt 0.05"])
def test_the_result_is_of_the_policy_that_was_chosen(write_run, chosen):
    """Found by its name, whichever is the fastest."""
    shown = Page(page.write(write_run(lambda e: e["decoding"].update(chosen=chosen)))).text
    blocks = {"epsilon 0.8": "19.0", "ltt 0.05": "24.5"}[chosen]
    name = chosen.replace("epsilon", "ε =")
    assert f"the policy {name}, lossy decoding ran {blocks} blocks" in shown


def test_a_policy_that_was_not_measured_is_not_shown_with_the_figures(write_run, evaluation):
    """Calibrated anew after the evaluation: the page says so, and shows what was measured."""
    workdir = write_run()
    measured = policies.from_json(evaluation["policy"])
    policies.save(measured, workdir / "policy.json")
    assert "another policy" not in Page(page.write(workdir)).text
    changed = policies.make([0.25, 0.75], method="ltt", alpha=0.1)
    policies.save(changed, workdir / "policy.json")
    shown = Page(page.write(workdir)).text
    assert "policy.json now holds another policy, ltt 0.1, which is not the one" in shown
    assert "6 never 18 0.8750" in shown and "0.7500" not in shown


@pytest.mark.parametrize("others", [[0.0], [0.25], [0.25, 0.125], [0.0, 0.125]])
def test_other_sources_have_their_parts_of_the_bar(write_run, others):
    """As many as the file knows: those of earlier versions know fewer."""

    def change(evaluation):
        evaluation["decoding"]["rows"][1] |= {"exit_shares": [0.5, 0.25, 0.25, *others]}

    html = page.write(write_run(change)).read_text(encoding="utf-8")
    bar = html.split('class="shares"')[2]
    widths = [float(x) for x in re.findall(r"flex:([\d.]+) 0 0", bar.split("</td>")[0])]
    assert widths == [0.5, 0.25, 0.25, *others]
    label = re.search(r'aria-label="(.*?)"', bar, re.DOTALL)[1]
    assert ("looked up: 25.0" in label) == (others[0] > 0)
    assert ("recurrent: 12.5" in label) == (others[1:] == [0.125])


def test_a_run_after_a_curriculum_has_its_curves(write_run):
    """Steps leave exits out; a KeyError there is no fault of the evaluation."""
    workdir = write_run()
    lines = [{"step": s, "loss": 1.0, f"loss/exit_{(6, 18)[s % 2]}": 1.0} for s in range(1, 5)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = Page(page.write(workdir))
    assert shown.tags.count("svg") == 3


def test_what_was_left_out_is_said(write_run):
    shown = Page(page.write(write_run(lambda e: e.update(left_out="no chat template"))))
    assert "no chat template" in shown.text


def test_without_policies_measured_nothing_is_claimed(write_run):
    def change(evaluation):
        evaluation["decoding"] |= {"chosen": None, "rows": evaluation["decoding"]["rows"][:1]}
        evaluation |= {"policy": None, "samples": [], "explorer": None}

    shown = Page(page.write(write_run(change))).text
    assert "nothing can be said yet" in shown and "as fast" not in shown


def test_what_is_not_in_the_folder_is_not_on_the_page(write_run):
    shown = Page(page.write(write_run(lambda evaluation: evaluation.update(policy=None))))
    assert "Decoding" in shown.text and shown.tags.count("svg") == 2
    assert "Tuning" not in shown.text and "Exit policy" not in shown.text


def test_a_missing_evaluation_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="launch.evaluate"):
        page.write(tmp_path)


def test_a_damaged_evaluation_is_an_error(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="evaluation.json is damaged.*launch.evaluate"):
        page.write(tmp_path)


@pytest.mark.parametrize("name", ["model", "decoding", "samples", "explorer", "machine", "policy"])
def test_an_evaluation_without_a_part_names_it_and_leaves_the_old_page(write_run, name):
    (write_run() / "report.html").write_text("old")
    workdir = write_run(lambda evaluation: evaluation.pop(name))
    with pytest.raises(ValueError, match=f"lacks what the report needs.*{name}"):
        page.write(workdir)
    assert (workdir / "report.html").read_text() == "old"


@pytest.mark.parametrize("part", ["said", "scores"])
def test_rows_of_another_length_are_no_answer(write_run, part):
    workdir = write_run(lambda e: e["explorer"]["answers"][0][part][1].pop())
    with pytest.raises(ValueError, match=f"{part} of an answer are not 3 rows of 5 pieces"):
        page.write(workdir)


@pytest.mark.parametrize("decoding", [[], {"rows": []}, {"rows": [None], "chosen": None}, None])
def test_an_evaluation_of_another_form_is_to_be_written_again(write_run, decoding):
    workdir = write_run(lambda evaluation: evaluation.update(decoding=decoding))
    with pytest.raises(ValueError, match="lacks what the report needs.*again with `launch.eval"):
        page.write(workdir)


def test_a_policy_of_another_model_is_an_error(write_run):
    workdir = write_run()
    policies.save(policies.make([0.5]), workdir / "policy.json")
    with pytest.raises(ValueError, match="1 thresholds but the model has 2 exits"):
        page.write(workdir)


def launch(workdir):
    return subprocess.run(
        [sys.executable, "-m", "launch.report", f"--workdir={workdir}"],
        capture_output=True,
        text=True,
    )


def test_the_command_prints_the_path(write_run):
    workdir = write_run()
    done = launch(workdir)
    assert (done.returncode, done.stdout) == (0, f"{workdir / 'report.html'}\n")


def test_the_command_says_what_is_missing(tmp_path):
    done = launch(tmp_path)
    assert done.returncode == 1
    assert "launch.evaluate" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("figure", [None, float("nan")])
def test_a_figure_that_there_is_not_is_a_dash(write_run, figure):
    """Null in the file; in files of before, NaN."""

    def change(evaluation):
        evaluation["exits"][0] |= {"correct": figure, "coverage": figure}
        evaluation["decoding"]["rows"][1]["agreement"] = figure

    text = page.write(write_run(change)).read_text()
    assert text.count("<td>–</td>") == 3 and not re.search(r"\b(nan|None)\b", text)
