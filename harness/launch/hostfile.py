"""A plain list of hosts, in the format of DeepSpeed's `--hostfile`: `worker-1 slots=8`."""

from __future__ import annotations

import re
from pathlib import Path

from harness.errors import NotFoundError, UserError
from harness.launch.machine import Device, Host, Machine
from harness.study.schema import unknown_key

# Names become arguments of ssh, where a dash first would be an option, and parts of file names.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")


def machine_of_hostfile(path: Path, device: Device) -> Machine:
    """The hosts of a hostfile, all reached over ssh, this machine too if it is listed.

    A line a host: `NAME slots=N`; N GPUs on CUDA, N cores on CPU. Empty lines and what follows a
    `#` are ignored. Raises UserError listing every problem as file:line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such hostfile; a line a host: `NAME slots=N`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no hostfile that can be read: {error}") from None
    hosts: dict[str, Host] = {}
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, found = words[0], _slots(words)
        if name in seen:
            found = f"host {name} is listed already, in line {seen[name]}; give each host one line"
        seen.setdefault(name, number)
        if isinstance(found, str):
            problems.append(f"{path}:{number}: {found}")
        else:
            slots = tuple(map(str, range(found)))
            hosts[name] = Host(name=name, slots=slots, remote=True)
    if not hosts and not problems:
        problems.append(f"{path}: lists no host; expected a line a host: `NAME slots=N`")
    if problems:
        raise UserError(*problems)
    return Machine(device=device, hosts=tuple(hosts.values()))


def _slots(words: list[str]) -> int | str:
    """Slots of a line, or what is wrong with it."""
    name, *settings = words
    if not _NAME.fullmatch(name):
        return f"{name!r} is no host name; expected letters, digits, . _ - and user@"
    slots: int | None = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key != "slots":
            return f"{key}: {unknown_key(key, ['slots'])}"
        if slots is not None:
            return f"slots is given twice for host {name}"
        if not re.fullmatch(r"[0-9]{1,5}", value) or int(value) < 1:
            return f"slots={value}: expected a whole number of at least 1"
        slots = int(value)
    return slots if slots is not None else f"host {name} has no slots; write `{name} slots=N`"
