"""Whether a text looks like what nobody but its owner may see. What is in a job, everybody sees who may look at the job."""

from __future__ import annotations

import re
from itertools import pairwise

NAME = re.compile(
    r"SECRET|PASSW|PASSPHRASE|PWD\b|_PASS\b|TOKEN|ACCESS_?KEY|API_?KEY|PRIVATE|CREDENTIAL|AUTHORIZATION|COOKIE|_KEY\b|_PAT\b",
    re.IGNORECASE,
)
NO_SECRET = re.compile(r"^(TOKENIZERS_PARALLELISM|.*_(FILE|PATH|DIR)|PWD|OLDPWD)$", re.IGNORECASE)
# With a slash in the password, too; what begins with digits and a slash is a port.
PASSWORD = re.compile(r"://[^/:@\s]*:(?!\d+/).*@")
KNOWN = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\bgh[opsur]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"  # GitHub, GitLab
    r"|\bhf_\w{20,}|\bsk-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{30,}|\bnpm_\w{30,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\."  # a JWT
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(Bearer|Basic)\s+\S{8,}"
    r"|[?&;](X-Amz-(Signature|Security-Token|Credential)|X-Goog-Signature|Signature|AWSAccessKeyId|sig|access_token|token|api_?key)=[^&\s]{6,}",
    re.IGNORECASE,
)
RANDOM = re.compile(r"(?<![\w/+.-])[A-Za-z0-9+/_]{24,}={0,2}(?![\w/+.-])")


def secret_in(text: str) -> str:
    """What looks like a secret, in words that do not tell it; empty if nothing does."""
    if PASSWORD.search(text):
        return "a password"
    if found := KNOWN.search(text):
        return (
            f"what begins with {found[0][:4]!r} looks like a key" if found[0][0].isalnum() else "a signature or a key"
        )
    for found in RANDOM.finditer(text):
        if looks_random(found[0]):
            return f"{len(found[0])} characters that look random"
    return ""


def named(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return bool(NAME.search(name)) and not NO_SECRET.match(name)


def looks_random(word: str) -> bool:
    """As a key does: small and capital letters and digits in turn, not words and numbers."""
    kinds = ["d" if c.isdigit() else "u" if c.isupper() else "l" if c.islower() else "" for c in word]
    turns = sum(a != b for a, b in pairwise(kinds))
    return {"d", "u", "l"} <= set(kinds) and 2.3 * turns >= len(word)
