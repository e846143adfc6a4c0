"""What is asked of Slurm, Kubernetes and Google Cloud, as far as it shows without them."""

import json
import os
import shlex
import sys
import types

import pytest
import yaml
from absl import app, flags
from absl.testing import flagsaver

from launch import processes
from launch.jobs import Job
from launch.slurm import submit
from launch.tpu import jobset, pod

COMMAND = ["python", "-m", "launch.tune", "--config.a='b: \"c\" $d'"]


@pytest.fixture(autouse=True)
def parsed_flags():
    with flagsaver.flagsaver(name="name", zone="zone"):
        flags.FLAGS.mark_as_parsed()
        yield


@pytest.fixture
def bin(tmp_path, monkeypatch):
    """A folder of programs that come before all others: `bin(name, lines of Python)`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def add(name, script):
        program = folder / name
        program.write_text(f"#!{sys.executable} -SE\n{script}")
        program.chmod(0o755)

    return add


# Slurm


def test_a_job_asks_for_what_is_given(tmp_path):
    job = Job(COMMAND, tmp_path / "100%,rate=1")
    flagged = {"nodes": 4, "tasks": 8, "time": "8:00:00", "sbatch": "--gres=gpu:8 --mem='a b'"}
    with flagsaver.flagsaver(**flagged):
        asked = submit.submission(job, after="17")
    at = asked.index(submit.SCRIPT.value)
    assert asked[:2] == ["sbatch", "--parsable"] and asked[at + 1 :] == COMMAND
    assert set(asked[2:at]) == {
        "--job-name=100%,rate=1",
        f"--output={tmp_path}/100%%,rate=1/log.txt",  # % begins a pattern there
        "--nodes=4",
        "--ntasks-per-node=8",
        "--time=8:00:00",
        "--gres=gpu:8",
        "--mem=a b",
        "--dependency=afterany:17",
    }
    assert not any("partition" in word or "depend" in word for word in submit.submission(job))


SBATCH = """
import json, pathlib, sys
calls = pathlib.Path(__file__).with_name("calls")
number = len(calls.read_text().splitlines()) if calls.exists() else 0
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print(f"{number};cluster")
"""


def test_as_many_jobs_run_at_a_time_as_said_and_none_is_queued_twice(bin, tmp_path, monkeypatch):
    jobs = [Job([name], tmp_path / name) for name in "abcde"]
    bin("sbatch", SBATCH)
    bin("squeue", "")
    submit.run(jobs, parallel=2, wait=False)
    calls = [json.loads(line) for line in (tmp_path / "bin" / "calls").read_text().splitlines()]
    assert [call[-1] for call in calls] == list("abcde")
    waits = [[word.rpartition(":")[2] for word in call if "afterany" in word] for call in calls]
    assert waits == [[], [], ["0"], ["1"], ["2"]]

    # Of these, one has ended meanwhile.
    bin("squeue", "print('0 RUNNING\\n1 PENDING\\n2 PENDING\\n4 PENDING\\n99 RUNNING')")
    submit.run(jobs, parallel=None, wait=False)
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert [json.loads(call)[-1] for call in calls[5:]] == ["d"]


def test_slurm_that_refuses_or_is_not_there_is_an_error(bin, tmp_path, monkeypatch):
    bin("squeue", "")
    bin("sbatch", "import sys; sys.exit('sbatch: error: invalid partition')")
    with pytest.raises(RuntimeError, match="sbatch: error: invalid partition"):
        submit.run([Job(COMMAND, tmp_path / "a")], None, wait=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match="no Slurm here: squeue is not installed"):
        submit.queue()


# Kubernetes


def test_a_manifest_has_a_pod_for_every_host(tmp_path):
    job = Job(COMMAND, tmp_path / "points=2-4,Learning_Rate=0.001" / ("x" * 80))
    flagged = {"image": "img:1", "claim": "runs", "slice": "4x4x8", "slices": 2}
    with flagsaver.flagsaver(**flagged):
        found = yaml.safe_load(jobset.manifest(job, tmp_path))
        other = yaml.safe_load(jobset.manifest(Job(COMMAND, tmp_path / "b"), tmp_path))
    name = found["metadata"]["name"]
    assert name != other["metadata"]["name"]
    # As JobSet names its pods.
    assert len(f"{name}-slice-0-31-abcde") <= 63 and name.replace("-", "").isalnum()
    assert name == name.lower()
    (slices,) = found["spec"]["replicatedJobs"]
    hosts = slices["template"]["spec"]
    assert slices["replicas"] == 2 and hosts["parallelism"] == hosts["completions"] == 32
    pod_spec = hosts["template"]["spec"]
    (container,) = pod_spec["containers"]
    assert container["command"] == COMMAND and container["image"] == "img:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"][0]["mountPath"] == str(tmp_path)
    assert pod_spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    # A run that was asked to leave does not count as failed.
    assert hosts["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]


@pytest.mark.parametrize(
    ("flagged", "message"),
    [
        ({"claim": None}, "--claim is missing"),
        ({"image": None}, "--image is missing"),
        ({"slice": "4*4"}, "--slice=4.4 is not like 4x4 or 4x4x8"),
        ({"slice": "1x2"}, "2 chips of --slice=1x2 are no whole number of hosts"),
    ],
)
def test_manifests_that_cannot_be(flagged, message, tmp_path):
    with (
        flagsaver.flagsaver(**{"image": "a", "claim": "b"} | flagged),
        pytest.raises(ValueError, match=message),
    ):
        jobset.run([Job(COMMAND, tmp_path / "a")], tmp_path)
    assert not list(tmp_path.iterdir())


def test_manifests_are_handed_over_only_if_asked(bin, tmp_path, capsys):
    bin("kubectl", "import sys; open(sys.argv[-1].partition('=')[2] + '.applied', 'w')")
    folder = tmp_path / "run"
    with flagsaver.flagsaver(image="a", claim="b"):
        jobset.run([Job(COMMAND, folder)], tmp_path)
        assert [path.name for path in folder.iterdir()] == ["jobset.yaml"]
        assert f"kubectl apply --filename={folder}/jobset.yaml" in capsys.readouterr().out
        with flagsaver.flagsaver(apply=True):
            jobset.run([Job(COMMAND, folder)], tmp_path)
    assert (folder / "jobset.yaml.applied").exists()


# Google Cloud

# Keeps a request as a file with its state. The hosts' command ends with a status of the list;
# what ends with 137 was ended by the loss of the slice.
GCLOUD = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
state, statuses = here / "state", here / "statuses"
with (here / "calls").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
verb = sys.argv[4]
if verb == "create":
    assert not state.exists()
    state.write_text("ACTIVE")
elif verb == "delete":
    state.unlink()
elif verb == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: not found")
    print(state.read_text())
elif verb == "ssh" and "--command=setup" not in sys.argv:
    status, *rest = json.loads(statuses.read_text())
    statuses.write_text(json.dumps(rest))
    if status == 137:
        state.write_text("SUSPENDED")
    sys.exit(status)
"""


@pytest.fixture
def cloud(bin, tmp_path, monkeypatch):
    """A Google Cloud: `calls()` gives the verbs that it was asked since the last time."""
    bin("gcloud", GCLOUD)
    monkeypatch.setattr(pod, "_POLL_SECONDS", 0)
    calls, seen = tmp_path / "bin" / "calls", []

    def verbs():
        lines = calls.read_text().splitlines()[len(seen) :]
        seen.extend(lines)
        words = [line.split() for line in lines]
        return [
            "setup" if line[-1] == "--command=setup" else line[3]
            for line in words
            if line[3] != "describe"
        ]

    return types.SimpleNamespace(
        calls=verbs,
        leave=lambda *statuses: (tmp_path / "bin" / "statuses").write_text(json.dumps(statuses)),
    )


def test_a_command_is_given_until_it_ends_by_itself(cloud):
    with flagsaver.flagsaver(type="v5p-256", setup="setup"):
        cloud.leave(75, 137, 75, 0)
        pod.run_to_the_end("tune")
        lost = ["delete", "create", "setup"]
        assert cloud.calls() == ["create", "setup", "ssh", "ssh", *lost, "ssh", "ssh"]
        cloud.leave(1)
        with pytest.raises(RuntimeError, match="the command failed with status 1"):
            pod.run_to_the_end("tune")
        assert cloud.calls() == ["ssh"]
        pod.delete()


def test_what_pod_would_do(capsys):
    flagged = {"project": "p", "type": "v5p-256", "spot": True, "setup": "pip list"}
    with flagsaver.flagsaver(dry_run=True, **flagged):
        pod.main(["pod", "run", *COMMAND[:3]])
    slice = "name --zone=zone --project=p"
    hosts = f"gcloud compute tpus tpu-vm ssh {slice} --worker=all"
    assert capsys.readouterr().out.splitlines() == [
        f"gcloud compute tpus queued-resources create {slice} --node-id=name "
        "--accelerator-type=v5p-256 --runtime-version=v2-alpha-tpuv5 --spot",
        f"{hosts} '--command=pip list'",
        f"{hosts} '--command=python -m launch.tune'",
    ]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["python", "x", "--a=b c"], "python x '--a=b c'"),
        (["cd a && python x --a='b c'"], "cd a && python x --a='b c'"),  # a line for the shell
        (["echo", "$HOME", "a'b"], "echo '$HOME' 'a'\"'\"'b'"),
    ],
)
def test_a_command_keeps_its_words_on_the_way_to_the_hosts(capsys, words, given):
    with flagsaver.flagsaver(dry_run=True, type="v5p-256"):
        pod.main(["pod", "run", *words])
    *_, last = shlex.split(capsys.readouterr().out)
    assert last == f"--command={given}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["drop"], "say what to do: create, run, delete"),
        (["run"], "a command for the hosts goes behind `run`"),
        (["delete", "all"], "behind `run`, and only there"),
        (["create"], "--type is missing"),
    ],
)
def test_what_pod_does_not_understand(words, message):
    with pytest.raises(app.UsageError, match=message):
        pod.main(["pod", *words])


# Processes


@pytest.mark.parametrize(
    ("environment", "has_fellows"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # in the job, but not in `srun`
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_process_knows_whether_it_is_alone(environment, has_fellows):
    assert processes.has_fellows(environment) == has_fellows


def test_processes_started_by_hand_say_which_they_are():
    with (
        flagsaver.flagsaver(coordinator="localhost:1", process_id=0),
        pytest.raises(ValueError, match="--num_processes and --process_id go together"),
    ):
        processes.initialize()
