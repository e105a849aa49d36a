"""Gets the source: the wheel's sdist, by pip, checked and unpacked with care.

pip itself knows the user's index, proxy, certificates and credentials, so it fetches.
`pip download` of an sdist would also run the package's build to learn its name (four
minutes); a stub in place of the build backend answers at once, and with `--require-hashes`
pip has checked the pinned sha256 before that. No code of the sdist runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from ollama_distributed.adapters.engines.build import plan
from ollama_distributed.base.errors import DigestMismatch, Invalid, Unavailable

DOWNLOAD_DEADLINE_S = 900.0
"""37 MB; slow lines included."""
_MAX_FILES = 20_000
"""The tree has about 4,000."""
_MAX_BYTES = 1_000_000_000
"""The tree has 0.15 GB."""
_TAIL = 1_500
"""Characters of pip's own words in an error."""

_STUB = f"""\
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    name = "{plan.SOURCE_PACKAGE}-{plan.SOURCE_VERSION}.dist-info"
    (Path(directory) / name).mkdir()
    (Path(directory) / name / "METADATA").write_text(
        "Metadata-Version: 2.1\\nName: {plan.SOURCE_PACKAGE}\\nVersion: {plan.SOURCE_VERSION}\\n"
    )
    return name
"""


def pip_command() -> list[str]:
    """How to run pip here: the installed one, else the one that Python carries for `ensurepip`.

    Raises:
        Unavailable: neither is there.
    """
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    with contextlib.suppress(ImportError):  # some systems' Python is without it
        import ensurepip

        for wheel in sorted(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")):
            return [sys.executable, str(wheel / "pip")]
    raise Unavailable(
        "`engine build` fetches the source with pip, which this Python lacks: install pip, or "
        f"give the file {plan.SOURCE_PACKAGE}-{plan.SOURCE_VERSION}.tar.gz with --source"
    )


async def download(folder: Path) -> Path:
    """The sdist in `folder`; at once if it is there already. Cancel-safe: pip is ended.

    Raises:
        Unavailable: pip could not get it; its own words are in the message.
    """
    done = folder / f"{plan.SOURCE_PACKAGE}-{plan.SOURCE_VERSION}.tar.gz"
    if done.exists():
        return done
    work = folder / "download"
    shutil.rmtree(work, ignore_errors=True)
    backend = work / "stub" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_STUB)
    requirements = work / "requirements.txt"
    requirements.write_text(
        f"{plan.SOURCE_PACKAGE}=={plan.SOURCE_VERSION} --hash=sha256:{plan.SOURCE_SHA256}\n"
    )
    process = await asyncio.create_subprocess_exec(
        *pip_command(),
        *("download", "--no-deps", "--no-build-isolation", "--no-input", "--progress-bar=off"),
        *("--no-binary", plan.SOURCE_PACKAGE, "--require-hashes", "-r", str(requirements), "-d", str(work)),
        env={**os.environ, "PYTHONPATH": str(work / "stub"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(DOWNLOAD_DEADLINE_S):
            output, _ = await process.communicate()
    except TimeoutError as exc:
        raise Unavailable(f"the source did not arrive within {DOWNLOAD_DEADLINE_S:g} s") from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Unavailable(
            "pip could not fetch the source; check its index settings (`pip config list`) and the "
            f"network, or give the file with --source. It said:\n{output.decode(errors='replace')[-_TAIL:]}"
        )
    (work / done.name).rename(done)
    shutil.rmtree(work)
    return done


def check(archive: Path) -> None:
    """Raises `DigestMismatch` unless it is the pinned file."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != plan.SOURCE_SHA256:
        raise DigestMismatch(f"{archive} has sha256 {found}; expected {plan.SOURCE_SHA256}")


def unpack(archive: Path, target: Path) -> None:
    """llama.cpp's tree as the folder `target`, made whole or not at all.

    Regular files below the expected root only: a link, a device or a path that leaves the
    root is refused, modes are ours, and count and size are bounded.

    Raises:
        Invalid: the archive holds something that it should not.
    """
    root = PurePosixPath(f"{plan.SOURCE_PACKAGE}-{plan.SOURCE_VERSION}", plan.SOURCE_TREE)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = size = 0
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not path.is_relative_to(root) or member.isdir():
                continue
            if not member.isreg() or ".." in path.parts:
                raise Invalid(f"{archive} holds {member.name!r}, which is no plain file in its place")
            files, size = files + 1, size + member.size
            if files > _MAX_FILES or size > _MAX_BYTES:
                raise Invalid(f"{archive} holds more than {_MAX_FILES} files or {_MAX_BYTES} B")
            written = partial.joinpath(*path.relative_to(root).parts)
            written.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with content, written.open("xb") as out:
                shutil.copyfileobj(content, out)
    if not (partial / "CMakeLists.txt").is_file():
        raise Invalid(f"{archive} does not hold {root}/CMakeLists.txt")
    partial.rename(target)
