"""Cluster files, and what `nlm launch` makes of them."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import yaml
from launched import free_port

from nlm.cli import main
from nlm.cluster import read_cluster
from nlm.config import Config
from nlm.launch import ROOT, Command, launch

EXAMPLES = sorted((ROOT / "configs" / "clusters").glob("*.toml"))
SLURM = {"kind": "slurm", "nodes": 1, "ranks_per_node": 2}


@pytest.fixture
def printed(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`printed(cluster file or table, ranks, …)`: what `nlm launch --dry-run` prints for a config of so many ranks."""

    def run(cluster: Path | dict[str, object], ranks: int, *words: str) -> str:
        path, file = tmp_path / "config.toml", tmp_path / "cluster.toml"
        path.write_text(make_config(train={"batch_tokens": 12 * ranks}).to_toml())
        if isinstance(cluster, dict):
            file.write_text(tomli_w.dumps(cluster))
            cluster = file
        overrides = [f"parallel.dp_replicate={ranks}", "log.dir=my runs/$(x)"]
        with pytest.raises(SystemExit) as end:
            main(["launch", str(path), *overrides, "--cluster", str(cluster), "--dry-run", *words])
        assert end.value.code == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples(file: Path, printed: Callable[..., str]) -> None:
    """Scripts that are there get the cluster's variables and, word for word, the overrides."""
    cluster = read_cluster(file)
    out = printed(file, cluster.ranks)
    if file.stem == "kubernetes":
        return  # a manifest: below
    lines = out.splitlines()
    assert len(lines) == (cluster.n_nodes if file.stem == "ssh" else 1)
    for line in lines:
        words = shlex.split(line)
        if file.stem == "ssh":
            assert words[0] == "ssh"
            words = shlex.split(words[-1])
        assert words[:3] == ["cd", str(ROOT), "&&"]
        (script,) = [word for word in words if word.startswith("launch/")]
        assert (ROOT / script).is_file()
        assert words[words.index(script) + 2 :] == [f"parallel.dp_replicate={cluster.ranks}", "log.dir=my runs/$(x)"]
        variables = [word for word in words[3 : words.index(script)] if re.match(r"[A-Z_]+=", word)]
        assert {f"{name}={value}" for name, value in cluster.environment.items()} <= set(variables)
        known = (ROOT / "launch" / "env.sh").read_text() + (ROOT / script).read_text()
        for name in {word.partition("=")[0] for word in variables} - set(cluster.environment):
            assert re.search(rf"^#  ? ?{name}  ", known, re.MULTILINE), f"{name} is none of {script}'s"
        if file.stem == "slurm":
            assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu"} <= set(words)


def test_what_is_printed_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    script = 'import os, sys; print(os.getcwd(), os.environ["X"], *sys.argv[1:], sys.stdin.read(), sep="|", end="")'
    command = Command(["python3", "-c", script, "it's", "$HOME"], {"X": 'say "x y"'}, str(folder), "a\n$HOME\n")
    out = subprocess.run(["bash", "-c", str(command)], capture_output=True, text=True, check=True).stdout
    assert out == f'{folder}|say "x y"|it\'s|$HOME|a\n$HOME\n'


@pytest.mark.parametrize("job", ["job", "pytorchjob"])
def test_kubernetes(job: str, printed: Callable[..., str]) -> None:
    cluster = {"kind": "kubernetes", "job": job, "name": "deep", "nodes": 3, "ranks_per_node": 2, "image": "i:1"}
    cluster |= {"claim": "disk", "environment": {"NCCL_IB_HCA": "mlx5"}, "namespace": "space", "interface": "eth0"}
    first, _, manifest = printed(cluster, 6).partition("\n")
    assert first == "kubectl --namespace space apply -f - <<'EOF'"
    documents = {d["kind"]: d for d in yaml.safe_load_all(manifest.removesuffix("EOF\n"))}
    if job == "job":
        spec = documents["Job"]["spec"]
        assert spec["completions"] == spec["parallelism"] == 3
        templates, address = [spec["template"]], "deep-0.deep"
        service = documents["Service"]
        assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"] == "deep"
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": documents["Job"]["metadata"]["name"]}
    else:
        replicas = documents["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
        assert [replicas[name]["replicas"] for name in ("Master", "Worker")] == [1, 2]
        templates, address = [replicas[name]["template"] for name in ("Master", "Worker")], "deep-master-0"
    for template in templates:
        (container,) = template["spec"]["containers"]
        words = container["command"] + container["args"]
        assert words[0] == "env"
        script = words.index("launch/torchrun.sh")
        variables = dict(word.split("=", 1) for word in words[1:script])
        assert variables["NNODES"] == "3" and variables["RANKS_PER_NODE"] == "2"
        assert variables["MASTER_ADDR"] == address
        assert variables["NCCL_IB_HCA"] == "mlx5" and variables["INTERFACE"] == "eth0"
        assert words[script + 2 :] == ["parallel.dp_replicate=6", "log.dir=my runs/$$(x)"], "$(x) would be replaced"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_a_sweep(printed: Callable[..., str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.write_text("optim.lr=1e-3 log.dir=a\noptim.lr=2e-3 log.dir=b\n")
    words = shlex.split(printed(SLURM, 2, "--sweep", str(sweep)))
    assert "--array=0-1" in words and f"SWEEP={sweep}" in words


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("optim.lr=1e-3\noptim.lr=2e-3\n", "log.dir: unused: of several runs"),
        ("optim.lr=1e-3 log.dir=a\n\n", "no empty line"),
        ("optim.lr=1e-3 log.dir=a\nparallel.tp=2 log.dir=b\n", "1 · 2 · 1 · 2 = 4 ranks"),
        ("optim.lr=1e-3 log.dir=a\noptim.rate=1 log.dir=b\n", "optim.rate: unknown key"),
    ],
)
def test_a_bad_sweep(lines: str, says: str, make_config: Callable[..., Config], tmp_path: Path) -> None:
    config, cluster, sweep = (tmp_path / name for name in ("config.toml", "cluster.toml", "sweep"))
    config.write_text(make_config(parallel={"dp_replicate": 2}).to_toml())
    cluster.write_text(tomli_w.dumps(SLURM))
    sweep.write_text(lines)
    with pytest.raises(ValueError, match=says):
        launch(str(config), [], cluster, sweep, dry_run=True)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"kind": "slum"}, "did you mean 'slurm'"),
        ({"kind": "ssh", "hosts": [], "ranks_per_node": 0, "nodes": 2}, "nodes: unknown key"),
        ({"kind": "mpi", "hosts": ["a"], "ranks_per_node": 8, "max_restarts": 1}, "max_restarts: unknown key"),
        (SLURM | {"mounts": ["/data:/data"]}, "mounts: are of a container"),
        (SLURM | {"container": "pyxis"}, "container and image: expected both"),
        ({"kind": "ssh", "hosts": ["a", "b"], "ranks_per_node": 2}, "= 1 ranks, but .* has 2 · 2 = 4"),
    ],
)
def test_a_bad_cluster(table: dict[str, object], says: str, make_config: Callable[..., Config], tmp_path: Path) -> None:
    config, cluster = tmp_path / "config.toml", tmp_path / "cluster.toml"
    config.write_text(make_config().to_toml())
    cluster.write_text(tomli_w.dumps(table))
    with pytest.raises(ValueError, match=says):
        launch(str(config), [], cluster, dry_run=True)


@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed")
def test_a_host_that_cannot_be_reached(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config, cluster = tmp_path / "config.toml", tmp_path / "cluster.toml"
    config.write_text(make_config().to_toml())
    table = {"kind": "ssh", "hosts": ["localhost"], "ranks_per_node": 1, "max_restarts": 1, "reconnect_s": 1}
    cluster.write_text(tomli_w.dumps(table | {"options": ["-F", "none", "-p", str(free_port())]}))
    command = [sys.executable, "-m", "nlm", "launch", config, "--cluster", cluster]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 255, done.stderr
    assert done.stderr.count("Connection refused") == 2, done.stderr
    assert done.stderr.count("nlm: localhost: the connection is lost; once more in 1 s") == 1, done.stderr


def test_nlm_without_its_clone(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nlm.launch.ROOT", tmp_path)
    config, cluster = tmp_path / "config.toml", tmp_path / "cluster.toml"
    config.write_text(make_config().to_toml())
    cluster.write_text(tomli_w.dumps({"kind": "local", "ranks_per_node": 1}))
    with pytest.raises(FileNotFoundError, match="come with nlm's clone"):
        launch(str(config), [], cluster, dry_run=True)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_the_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if script.name != "env.sh":
        assert script.stat().st_mode & 0o111, "not executable"
