"""Certificates of a cluster's authority, made with openssl."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def certificate_files(folder: Path, name: str, address: str = "127.0.0.1") -> dict[str, str]:
    """Options that name the files of a new authority and of one process on a loopback address."""

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-keyout", f"{name}-ca.key", "-out", f"{name}-ca.pem", "-subj", f"/CN={name}",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-days", "2",
    )  # fmt: skip
    openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=pod",
        "-addext", f"subjectAltName=IP:{address}",
    )  # fmt: skip
    openssl(
        "x509", "-req", "-in", f"{name}.csr", "-CA", f"{name}-ca.pem", "-copy_extensions",
        "copy", "-CAkey", f"{name}-ca.key", "-out", f"{name}.pem", "-days", "2",
    )  # fmt: skip
    return {
        "cluster_tls_cert": str(folder / f"{name}.pem"),
        "cluster_tls_key": str(folder / f"{name}.key"),
        "cluster_tls_ca": str(folder / f"{name}-ca.pem"),
    }
