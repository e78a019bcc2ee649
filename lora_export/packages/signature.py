"""A signature over all files of a package, by model-signing, with a key and without a network."""

from pathlib import Path
from typing import Any

from lora_export.contracts import Finding
from lora_export.errors import InputError
from lora_export.packages.contents import SIGNATURE


def check_key(key: Path) -> None:
    """InputError, before any work, unless `key` is a private key in PEM on the curve P-256, P-384 or P-521."""
    _library()
    from model_signing._signing.sign_ec_key import Signer

    try:
        Signer(key)
    except (ValueError, TypeError, AttributeError, OSError) as error:  # a key of another kind has no curve
        raise InputError(
            f"not a key to sign with: {error}",
            where=key,
            expected="an unencrypted private key in PEM on the curve P-256, P-384 or P-521",
            next_step="openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        ) from None


def sign(folder: Path, key: Path) -> None:
    """Write `folder`/model.sig with a key that `check_key` accepted."""
    signing, hashing = _library()
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(_hashing(hashing, folder)).sign(folder, folder / SIGNATURE)


def verify(folder: Path, key: Path) -> Finding:
    """Whether model.sig was made by the owner of the public `key`, over these files."""
    if not (folder / SIGNATURE).is_file():
        return Finding("signature", False, f"a public key was given, but {SIGNATURE} is missing")
    _library()
    from model_signing import hashing, verifying

    config: Any = verifying.Config()  # type: ignore[no-untyped-call]
    config.use_elliptic_key_verifier(public_key=key)
    config.set_hashing_config(_hashing(hashing, folder))
    try:
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:
        return Finding("signature", False, f"{SIGNATURE} was not made with this key over these files: {error}")
    return Finding("signature", True, "made with this key, over every file")


def _hashing(hashing: Any, folder: Path) -> Any:
    return hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)


def _library() -> tuple[Any, Any]:
    try:
        from model_signing import hashing, signing
    except ImportError as error:
        raise InputError(
            f"model-signing is not installed: {error}",
            expected="the extra `signing`",
            next_step="pip install 'lora-export[signing]'",
        ) from None
    return signing, hashing
