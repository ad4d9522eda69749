"""Builds the Containerfile without a container engine, and runs the result. It needs root and debootstrap.

    .venv/bin/python -m tests.system.containerfile [--base FOLDER] [--ca FILE]

Each stage is a root folder that debootstrap makes from the stage's distribution, not the image that FROM names: COPY
copies, RUN runs in a chroot. Then the last stage's entry point runs as its user, in a read-only root, with a simulator:
it must deliver, write only to its volume, and stop with exit code 0 on the image's signal. This does not show whether
an engine accepts the file, nor what the base image lacks.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.polling import until
from vodpoller.examples import EXAMPLES
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.service import Simulator

ROOT = Path(__file__).resolve().parents[2]
EVENTS = 40
CHROOT = shutil.which("chroot") or "chroot"
IN_A_NAMESPACE = "VODPOLLER_CONTAINERFILE_NAMESPACE"
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}  # as container engines set it


@dataclass
class Stage:
    """One FROM and the instructions after it."""

    image: str
    name: str
    steps: list = field(default_factory=list)
    env: dict = field(default_factory=dict)
    user: str = "0:0"
    stop_signal: str = ""
    command: list = field(default_factory=list)

    @property
    def suite(self):
        """The suite of Debian, such as bookworm."""
        return re.fullmatch(r"docker\.io/library/debian:(\w+)-slim", self.image)[1]


def stages_of(text):
    """The stages of a Containerfile. Raises ValueError for an instruction that is not supported here."""
    stages = []
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        match instruction:
            case "":
                pass
            case "FROM":
                image, _, name = rest.partition(" AS ")
                stages.append(Stage(image=image, name=name))
            case "RUN" | "COPY":
                stages[-1].steps.append((instruction, " ".join(rest.split()), dict(stages[-1].env)))
            case "ENV":
                name, _, value = rest.partition("=")
                stages[-1].env[name] = value
            case "USER":
                stages[-1].user = rest
            case "STOPSIGNAL":
                stages[-1].stop_signal = rest
            case "ENTRYPOINT" | "CMD":
                stages[-1].command += json.loads(rest)
            case _:
                raise ValueError(f"{instruction} is not known here")
    return stages


class Builder:
    """Makes the roots of all stages.

    Args:
        folder: Folder for the roots.
        base: A root made by debootstrap; it is made if it does not exist.
        ca: PEM file with further certificates that pip trusts, or None.
    """

    def __init__(self, folder, base, ca):
        self.folder = folder
        self.base = base
        self.ca = ca
        self.roots = {}

    def build(self, stage, number):
        """Build the root of a stage; returns its path."""
        root = self.folder / (stage.name or f"stage{number}")
        self.roots[stage.name] = root
        if not self.base.exists():
            say(f"debootstrap {stage.suite}")
            subprocess.run(["debootstrap", "--variant=minbase", stage.suite, str(self.base)], check=True)
        subprocess.run(["cp", "--archive", "--reflink=auto", str(self.base), str(root)], check=True)
        shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        mount("--types", "proc", "proc", root / "proc")
        for instruction, words, env in stage.steps:
            say(f"{instruction} {words}")
            if instruction == "RUN":
                self.run(root, words, {**ENV, **env})
            else:
                self.copy(root, words)
        return root

    def run(self, root, command, env):
        if self.ca:
            shutil.copy(self.ca, root / "tmp" / "ca.pem")
            env["PIP_CERT"] = "/tmp/ca.pem"
        subprocess.run([CHROOT, str(root), "/bin/sh", "-c", command], env=env, check=True)

    def copy(self, root, words):
        *sources, target = shlex.split(words)
        origin = ROOT
        if sources[0].startswith("--from="):
            origin = self.roots[sources.pop(0).partition("=")[2]]
        place = root / target.lstrip("/")
        for source in sources:
            path = origin / source.lstrip("/")
            to = place / path.name if target.endswith("/") else place
            to.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "--archive", "--no-target-directory", str(path), str(to)], check=True)


def say(text):
    sys.stderr.write(f"+ {text}\n")


def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True)


def try_image(root, stage):
    """Run the image's command as its user, with a read-only root."""
    user, group = map(int, stage.user.split(":"))
    volume = root / "var/lib/vodpoller"
    secrets = root / stage.env["CREDENTIALS_DIRECTORY"].lstrip("/")
    secrets.mkdir(parents=True)
    (secrets / "secret_id").write_text("AKIDcontainer")
    (secrets / "secret_key").write_text("the-key-of-a-container")
    with Simulator(SimulatorOptions(events=EVENTS, poll_secs=1.0)) as simulator:
        (root / "etc/vodpoller").mkdir()
        (root / "etc/vodpoller/config.toml").write_text(
            f'[api]\nendpoint = "{simulator.url}"\n[[sources]]\nname = "main"\n[[routes]]\nname = "all"\n'
            'sinks = ["archive"]\n[sinks.archive]\ntype = "file"\npath = "/var/lib/vodpoller/events.jsonl"\n'
        )
        mount("--bind", root, root)
        mount("--bind", volume, volume)
        mount("--options", "remount,bind,ro", root)
        command = [CHROOT, f"--userspec={user}:{group}", str(root), *stage.command]
        say(f"as {user}:{group}, read-only: {shlex.join(stage.command)}")
        env = {**ENV, **stage.env}
        with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL) as process:
            archive = volume / "events.jsonl"

            def delivered():
                assert process.poll() is None, f"it ended with {process.returncode}"
                return simulator.stats()["confirmed"] == EVENTS

            until(delivered, secs=60)
            process.send_signal(signal.Signals[stage.stop_signal])
            assert process.wait(60) == 0, process.returncode
        assert len(archive.read_text().splitlines()) == EVENTS
        assert {path.stat().st_uid for path in volume.iterdir()} == {user}
    say(f"{EVENTS} events delivered, confirmed and kept in the volume; stopped by {stage.stop_signal} with exit code 0")


def main():
    """Build and try."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--base", type=Path, help="A root made by debootstrap; it is kept for the next run.")
    options.add_argument("--ca", type=Path, help="PEM with certificates that pip trusts, if a proxy opens TLS.")
    chosen = options.parse_args()
    if IN_A_NAMESPACE not in os.environ:
        # All mounts end with the namespace.
        os.environ[IN_A_NAMESPACE] = "1"
        words = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.system.containerfile"]
        os.execvp(words[0], [*words, *sys.argv[1:]])
    stages = stages_of(EXAMPLES["containerfile"].read().decode())
    with tempfile.TemporaryDirectory(prefix="containerfile-") as name:
        folder = Path(name)
        builder = Builder(folder, chosen.base or folder / "base", chosen.ca)
        try:
            for number, stage in enumerate(stages):
                root = builder.build(stage, number)
            try_image(root, stages[-1])
        finally:
            # Before the folder is deleted: otherwise mounted files would be deleted as well.
            for place in reversed(list(mounts_in(folder))):
                subprocess.run(["umount", "--lazy", place], check=True)


def mounts_in(folder):
    """The mount points inside a folder, the outermost first."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split()[1]
        if place.startswith(f"{folder}/"):
            yield place


if __name__ == "__main__":
    main()
