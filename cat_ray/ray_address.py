"""The Ray cluster that RAY_ADDRESS names: its address is checked before Ray waits for it."""

import os
import re

import grpc
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address

from cat_ray.errors import BadInput

VARIABLE = "RAY_ADDRESS"
ANSWER_SECONDS = 5.0
# Every server of gRPC has it; a cluster with tokens may want one for the answer.
QUESTION = "/grpc.health.v1.Health/Check"
ANSWERS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
FORM = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+):\d{1,5}")
ADVICE = (
    "set it to the address and port of the cluster's head, as in 10.0.0.1:6379, or unset it to use "
    "this machine alone"
)
DASHBOARD = "that is a dashboard, which only takes jobs (`cat-ray submit`)"
OTHER_FORMS = {
    "ray": "that is Ray Client, through which these commands can't run",
    "http": DASHBOARD,
    "https": DASHBOARD,
}


def named_cluster() -> str | None:
    """Host and port of the cluster's head, which answers; None: no cluster is named.

    Raises:
        BadInput: the address has another form, or no head of a cluster answers there.
    """
    named = os.environ.get(VARIABLE, "")
    if named in ("", "local"):
        return None
    # Whoever put a password into it doesn't want to see it in a log.
    told = f"{VARIABLE}={re.sub('[^/]*@', '...@', named)}"
    if named != "auto" and not FORM.fullmatch(named):
        scheme = named.partition("://")[0]
        raise BadInput(f"{told}: {OTHER_FORMS.get(scheme, 'that is no address')}; {ADVICE}")
    try:
        address = canonicalize_bootstrap_address(named)
    except (ConnectionError, ValueError) as error:
        raise BadInput(f"no Ray cluster was found for {told}; {ADVICE}") from error
    silence = _silence(address or named)
    if silence is not None:
        raise BadInput(f"no Ray cluster answers at {told}: {silence}; {ADVICE}")
    return address


def _silence(address: str) -> str | None:
    """Why no head answers, for which Ray itself waits for minutes; None: one does."""
    # A proxy for the web doesn't lead there.
    with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(QUESTION)(b"", timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            details = error.details() or str(error.code())
            if error.code() in ANSWERS:
                return None
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"nothing came in {ANSWER_SECONDS:g} s"
            if "HTTP/2" in details or "http2" in details:
                return "what listens there is something else"
            # The last of its words is what the operating system said.
            return details.split(": ")[-1].rstrip("]")
    return None
