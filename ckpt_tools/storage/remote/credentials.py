"""Owns the settings of a store that lie in files and variables which its library does not read itself.

obstore reads the environment variables of each cloud, the files of Google and the identity of a machine. It
does not read the files of the AWS command line.
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path

_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
_SECRET = ("access_key_id", "secret_access_key", "session_token")


def aws_settings() -> dict[str, str]:
    """What the variables and files of AWS say, in the names of obstore; what it finds itself is left out."""
    variables = os.environ
    found: dict[str, str] = {}
    profile = variables.get("AWS_PROFILE") or variables.get("AWS_DEFAULT_PROFILE") or "default"
    home = Path("~/.aws").expanduser()
    for variable, name, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        files = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            files.read(Path(variables.get(variable) or home / name).expanduser(), "utf-8")
        except (configparser.Error, OSError, ValueError):
            continue
        if files.has_section(section):
            for key, own in _KEYS.items():
                if value := files.get(section, key, fallback="").strip():
                    found[own] = value
    if variables.get("AWS_ACCESS_KEY_ID"):
        found = {key: value for key, value in found.items() if key not in _SECRET}
    if region := variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION"):
        found["region"] = region
    if endpoint := variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL"):
        found["endpoint"] = endpoint
    return found


def google_settings() -> dict[str, str]:
    """The server that is asked in place of Google's.

    Google's libraries have a variable for a server of tests. Such a server takes any credentials.
    """
    if server := os.environ.get("STORAGE_EMULATOR_HOST"):
        url = server if "://" in server else f"http://{server}"
        return {"base_url": url, "bearer_token": "none"}
    server = os.environ.get("GOOGLE_BASE_URL")
    return {"base_url": server} if server else {}
