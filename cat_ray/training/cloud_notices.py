"""The metadata endpoints where AWS, GCP and Azure tell a machine that they take it away."""

import logging
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import ClassVar, Literal
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from cat_ray.json_text import parse_json
from cat_ray.training.preemption import CloudSource, Notice, earliest

logger = logging.getLogger(__name__)

# Seconds without a byte after which an endpoint counts as not answering.
TIMEOUT_SECONDS = 2.0

AWS_ACTION = "/latest/meta-data/spot/instance-action"
AWS_TOKEN = "/latest/api/token"
AWS_TOKEN_SECONDS = 60

GCP_PREEMPTED = "/computeMetadata/v1/instance/preempted"
GCP_MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
# GCP tells that it takes a machine, but not when. The least that its documentation promises: 30 s
# for a spot machine, and before maintenance 60 s (an hour with a GPU).
GCP_PREEMPTION_SECONDS = 30.0
GCP_MAINTENANCE_SECONDS = 60.0

AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
AZURE_HEADERS = {"Metadata": "true"}
AZURE_REASONS = {"Preempt": "spot eviction", "Terminate": "deletion"}


class Endpoint:
    """A metadata endpoint. One that doesn't answer, or not as documented, tells no notice."""

    cloud: ClassVar[str]
    usual_address: ClassVar[str] = "http://169.254.169.254"

    def __init__(self, address: str | None = None):
        self._address = (address or self.usual_address).rstrip("/")
        # Metadata is this machine's own: a proxy would answer with its machine's, or not at all.
        self._opener = build_opener(ProxyHandler({}))
        self._told = False

    def poll(self) -> Notice | None:
        """What the endpoint tells now. The first of several failures in a row is logged."""
        try:
            notice = self._look()
        except (OSError, HTTPException, ValueError) as error:
            if not self._told:
                logger.warning(
                    "no preemption notices from %s at %s: %s; polling goes on",
                    self.cloud,
                    self._address,
                    error,
                )
            self._told = True
            return None
        self._told = False
        return notice

    def _look(self) -> Notice | None:
        """As `poll`.

        Raises:
            OSError, HTTPException: no answer, or an HTTP status that tells an error.
            ValueError: the answer is not as documented.
        """
        raise NotImplementedError

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str:
        request = Request(self._address + path, headers=headers, method=method)
        with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.read().decode().strip()


class Aws(Endpoint):
    """Spot interruptions, told two minutes before (a machine that hibernates: at that moment).

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """

    cloud = "AWS"

    def _look(self) -> Notice | None:
        # A token for each look, as in AWS's own example: one that is kept expires some day.
        wish = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_SECONDS)}
        token = self._ask(AWS_TOKEN, wish, method="PUT")
        try:
            answer = self._ask(AWS_ACTION, {"X-aws-ec2-metadata-token": token})
        except HTTPError as error:
            if error.code == 404:
                return None
            raise
        match parse_json(answer):
            case {"action": str(action), "time": str(told)}:
                deadline = _unix_seconds(datetime.fromisoformat(told))
                return Notice(f"AWS takes this machine (spot interruption: {action})", deadline)
        raise ValueError(f"unexpected answer {answer!r}")


class Gcp(Endpoint):
    """Preemption of spot machines, and host maintenance that doesn't migrate the machine.

    GCP tells no time: a deadline counts from when this source first saw its reason.

    https://cloud.google.com/compute/docs/instances/create-use-spot
    https://cloud.google.com/compute/docs/gpus/gpu-host-maintenance
    """

    cloud = "GCP"
    usual_address = "http://metadata.google.internal"

    def __init__(self, address: str | None = None):
        super().__init__(address)
        self._notice: Notice | None = None

    def _look(self) -> Notice | None:
        headers = {"Metadata-Flavor": "Google"}
        preempted = self._ask(GCP_PREEMPTED, headers)
        if preempted not in ("TRUE", "FALSE"):
            raise ValueError(f"unexpected answer {preempted!r}")
        if preempted == "TRUE":
            self._see("GCP takes this machine (preemption)", GCP_PREEMPTION_SECONDS)
        elif self._ask(GCP_MAINTENANCE, headers) == "TERMINATE_ON_HOST_MAINTENANCE":
            self._see("GCP takes this machine (host maintenance)", GCP_MAINTENANCE_SECONDS)
        else:
            self._notice = None
        return self._notice

    def _see(self, reason: str, seconds: float) -> None:
        if self._notice is None or self._notice.reason != reason:
            self._notice = Notice(reason, time.time() + seconds)


class Azure(Endpoint):
    """Spot evictions, told 30 s before, and deletions, told 5 to 15 minutes before if enabled.

    A machine's first answer may take two minutes: Azure turns the service on by the request.

    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
    """

    cloud = "Azure"

    def _look(self) -> Notice | None:
        answer = self._ask(AZURE_EVENTS, AZURE_HEADERS)
        match parse_json(answer):
            case {"Events": [*events]}:
                notices = [self._notice(event) for event in events]
                return earliest(notice for notice in notices if notice is not None)
        raise ValueError(f"unexpected answer {answer!r}")

    def _notice(self, event: object) -> Notice | None:
        match event:
            case {"EventType": str(kind)} if kind not in AZURE_REASONS:
                return None
            case {"EventType": str(kind), "Resources": [*machines], "NotBefore": str(told)}:
                # All machines of a scale set are told the events of each. Events don't name them
                # by their host names.
                if self._ask(AZURE_NAME, AZURE_HEADERS) not in machines:
                    return None
                # An event that has begun tells no time any more.
                deadline = _unix_seconds(parsedate_to_datetime(told)) if told else time.time()
                return Notice(f"Azure takes this machine ({AZURE_REASONS[kind]})", deadline)
        raise ValueError(f"unexpected event {event}")


ENDPOINTS = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def cloud_source(name: Literal["aws", "gcp", "azure"], address: str | None = None) -> CloudSource:
    """Where a cloud tells this machine that it is taken away.

    Args:
        name: the cloud.
        address: the endpoint as `http://host:port`; None: where the cloud has it.
    """
    return ENDPOINTS[name](address)


def _unix_seconds(moment: datetime) -> float:
    """AWS and Azure tell times in UTC, with a zone or without."""
    return moment.replace(tzinfo=UTC).timestamp()
