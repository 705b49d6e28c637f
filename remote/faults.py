"""What a store's client says of its faults, as one line with the way out."""

import re

CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key's file "
    "(GOOGLE_SKIP_SIGNATURE=true for a public bucket)",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY "
    "(AZURE_SKIP_SIGNATURE=true for a public container)",
    "hf": "check the name, or set HF_TOKEN for a dataset that is private",
    "https": "expected files that anyone may read",
}
"""By scheme, where access is refused."""
METADATA_SERVICES = ("169.254.169.254", "metadata.google.internal")
"""Where a client asks for credentials that the environment does not have: the machine's own, in a cloud."""

_WRAPPED = re.compile(r"(?:Generic \w+ error: |Error performing (?:token|list) request: )+")
_PERFORMED = re.compile(r"Error performing (\w+) (\S+?)(?:\?\S*)? in [\d.]+\S+ - ")


def first_line(fault: BaseException | None) -> str:
    """What went wrong, of an error that has many lines and names each of its layers."""
    text = str(fault).strip().partition("\n")[0]
    return _PERFORMED.sub(r"\1 \2: ", _WRAPPED.sub("", text))[:300]


def way_in(address: str) -> str:
    """What to set so that an address may be read or written."""
    scheme = address.partition(":")[0]
    return CREDENTIALS.get(scheme, CREDENTIALS["https"])


def lacks_credentials(fault: BaseException) -> bool:
    """Whether the client found none in the environment and then none on the machine."""
    return any(host in str(fault) for host in METADATA_SERVICES)


def no_bucket(fault: BaseException) -> bool:
    """Whether a listing found none."""
    return "404 Not Found" in str(fault)


def wrong_region(fault: BaseException) -> bool:
    """S3 leads to the bucket's region by a redirect that names no place."""
    return "incorrectly configured region" in str(fault)
