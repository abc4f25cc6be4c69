"""The files of cluster/: each against the schema of who reads it, and against each other."""

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.autoscaler._private.util import prepare_config, validate_config

from cat_ray import config as configuration
from cat_ray.operations.prometheus import METRICS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = Path(__file__).parent / "cluster_schemas"
KUBERNETES = "1.37"
DOCKERFILE = (CLUSTER / "image" / "Dockerfile").read_text()

# What the code exports; Prometheus has them with Ray's prefix.
EXPORTED = {f"ray_{metric.name}" for metric in METRICS}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def document(name: str) -> Any:
    (only,) = documents(name)
    return only


def check(content: Any, schema_name: str, kind: str | None = None) -> None:
    schema = yaml.safe_load((SCHEMAS / schema_name).read_text())
    jsonschema.validate(content, {**schema, **({"$ref": f"#/$defs/{kind}"} if kind else {})})


# Kubernetes.


def ray_cluster(name: str) -> dict[str, Any]:
    spec = document(f"kuberay/{name}")["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(cluster: dict[str, Any]) -> dict[str, Any]:
    """Each group's pod template, by the group's name."""
    templates = {"head": cluster["headGroupSpec"]["template"]}
    return templates | {g["groupName"]: g["template"] for g in cluster["workerGroupSpecs"]}


def container(template: dict[str, Any]) -> dict[str, Any]:
    (only,) = template["spec"]["containers"]
    return only


def as_pod(spec: dict[str, Any], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    metadata = {"name": "pod", **(metadata or {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def check_manifest(content: dict[str, Any]) -> None:
    """Raises a ValidationError for whatever Kubernetes or KubeRay would refuse or ignore."""
    if content["kind"] not in ("RayCluster", "RayJob"):
        kubernetes_validate.validate(content, KUBERNETES, strict=True)
        return
    check(content, "kuberay.yaml", content["kind"])
    cluster = content["spec"].get("rayClusterSpec", content["spec"])
    for template in pods(cluster).values():
        pod = as_pod(template["spec"], template["metadata"])
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    options = cluster["autoscalerOptions"]
    sidecar = {"name": "autoscaler", "securityContext": options["securityContext"]}
    kubernetes_validate.validate(as_pod({"containers": [sidecar]}), KUBERNETES, strict=True)


MANIFESTS = sorted(path.name for path in (CLUSTER / "kuberay").iterdir())


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_and_kuberay_know_every_field(name):
    for content in documents(f"kuberay/{name}"):
        check_manifest(content)


def groups(content: dict[str, Any]) -> list[dict[str, Any]]:
    return content["spec"]["workerGroupSpecs"]


@pytest.mark.parametrize(
    "misspell",
    [
        lambda c: c["spec"].update(authOption=c["spec"].pop("authOptions")),
        lambda c: c["spec"]["authOptions"].update(mode="tokens"),
        lambda c: c["spec"]["autoscalerOptions"].update(idleTimeoutSecond=1),
        lambda c: c["spec"]["headGroupSpec"]["rayStartParams"].update({"num-gpus": 0}),
        lambda c: groups(c)[1].update(maxReplica=1),
        lambda c: groups(c)[1].pop("groupName"),
        lambda c: groups(c)[1]["template"]["spec"].update(terminationGracePeriod=1),
        lambda c: groups(c)[1]["template"]["spec"]["tolerations"][0].update(operater="Exists"),
        lambda c: container(groups(c)[0]["template"]).update(lifecycle={"prestop": {}}),
        lambda c: groups(c)[0]["template"]["metadata"].update(annotation={}),
        lambda c: c["spec"]["autoscalerOptions"]["securityContext"].update(privilege=True),
    ],
)
def test_a_misspelt_field_is_found(misspell: Callable[[dict[str, Any]], None]):
    content = copy.deepcopy(document("kuberay/ray-cluster.yaml"))
    misspell(content)
    with pytest.raises(jsonschema.ValidationError):
        check_manifest(content)


def test_the_job_has_the_same_cluster_as_the_one_that_stays():
    assert ray_cluster("ray-job.yaml") == ray_cluster("ray-cluster.yaml")


def test_the_entrypoint_is_a_job_of_ours_with_keys_that_exist():
    entrypoint = document("kuberay/ray-job.yaml")["spec"]["entrypoint"]
    command, verb, job, *options = shlex.split(entrypoint)
    assert (command, verb) == ("cat-ray", "train")
    assert options[::2] == ["--set"] * (len(options) // 2)
    # Where the image has them.
    assert "COPY jobs /home/ray/jobs" in DOCKERFILE
    path = ROOT / "jobs" / Path(job).relative_to("/home/ray/jobs")
    config = configuration.load(str(path), options[1::2])
    mounts = container(pods(ray_cluster("ray-job.yaml"))["spot"])["volumeMounts"]
    assert config.checkpoints.local_folder
    assert any(config.checkpoints.local_folder.startswith(m["mountPath"]) for m in mounts)


def test_pods_have_time_for_the_hook_and_for_what_ray_does_afterwards():
    for name, template in pods(ray_cluster("ray-cluster.yaml")).items():
        ray = container(template)
        env = {each["name"]: each["value"] for each in ray["env"]}
        seconds = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        if name in ("on-demand", "spot"):
            program, drained = ray["lifecycle"]["preStop"]["exec"]["command"]
            assert (CLUSTER / "image" / program).exists()
            seconds += float(drained)
        assert template["spec"]["terminationGracePeriodSeconds"] > seconds


def test_every_pod_runs_without_root_and_without_keys():
    for template in pods(ray_cluster("ray-cluster.yaml")).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert f"--uid {spec['securityContext']['runAsUser']} " in DOCKERFILE
        assert spec["serviceAccountName"] == documents("kuberay/shared.yaml")[0]["metadata"]["name"]
        ray = container(template)
        assert not ray["securityContext"]["allowPrivilegeEscalation"]
        assert [m["name"] for m in ray["volumeMounts"]] == [v["name"] for v in spec["volumes"]]
        assert template["metadata"]["annotations"] == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"
        }


def test_spot_and_on_demand_pods_go_to_machines_of_their_kind():
    def wanted(group: str) -> tuple[str, str, list[str]]:
        spec = pods(ray_cluster("ray-cluster.yaml"))[group]["spec"]
        affinity = spec["affinity"]["nodeAffinity"]
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        (rule,) = term["matchExpressions"]
        return rule["key"], rule["operator"], rule["values"]

    key, operator, values = wanted("spot")
    assert operator == "In"
    assert wanted("head") == wanted("on-demand") == (key, "NotIn", values)


def test_the_disruption_budgets_select_pods_that_exist():
    templates = pods(ray_cluster("ray-cluster.yaml"))
    for budget in documents("kuberay/shared.yaml")[1:]:
        labels = budget["spec"]["selector"]["matchLabels"]
        # KubeRay adds these two.
        group = labels.pop("ray.io/group", labels.pop("ray.io/node-type", None))
        assert labels and labels.items() <= templates[group]["metadata"]["labels"].items()
        # Of pods whose owner Kubernetes doesn't know it takes nothing else.
        assert type(budget["spec"]["minAvailable"]) is int


# Ray's own autoscaler.


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_takes_the_cluster_file(cloud):
    content = document(f"ray/{cloud}.yaml")
    # Without the defaults, which would hide what is missing.
    validate_config({"cluster_synced_files": [], **content})
    validate_config(prepare_config(copy.deepcopy(content)))
    types = content["available_node_types"]
    assert sum(each["max_workers"] for each in types.values()) == content["max_workers"]


@pytest.mark.parametrize("key", ["max_worker", "filemounts"])
def test_ray_refuses_a_misspelt_key(key):
    content = {"cluster_synced_files": [], **document("ray/aws.yaml"), key: 1}
    with pytest.raises(jsonschema.ValidationError, match=key):
        validate_config(content)


def check_ec2(node: dict[str, Any]) -> None:
    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape)
    assert not report.has_errors(), report.generate_report()
    assert node["InstanceType"] in shape.members["InstanceType"].enum


@pytest.mark.parametrize("kind", document("ray/aws.yaml")["available_node_types"])
def test_ec2_knows_every_field_of_a_machine(kind):
    node = document("ray/aws.yaml")["available_node_types"][kind]["node_config"]
    check_ec2(node)
    assert ("InstanceMarketOptions" in node) == kind.endswith("spot")
    with pytest.raises(AssertionError, match="BlockDeviceMapping"):
        check_ec2({**node, "BlockDeviceMapping": []})


@pytest.mark.parametrize("kind", document("ray/gcp.yaml")["available_node_types"])
def test_compute_engine_knows_every_field_of_a_machine(kind):
    node = document("ray/gcp.yaml")["available_node_types"][kind]["node_config"]
    check(node, "gcp_instance.yaml")
    spot = node.get("scheduling", {}).get("provisioningModel") == "SPOT"
    assert spot == kind.endswith("spot")
    with pytest.raises(jsonschema.ValidationError, match="preemptable"):
        check({**node, "scheduling": {"preemptable": True}}, "gcp_instance.yaml")


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_every_machine_asks_for_the_token_which_is_not_in_the_file(cloud):
    content = document(f"ray/{cloud}.yaml")
    assert "-e RAY_AUTH_MODE=token" in content["docker"]["run_options"]
    assert content["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


# The image.


def pins() -> dict[str, Requirement]:
    found = re.findall(r"^ +\"?([\w\-]+(?:\[[\w,]+\])?==[\w.]+)", DOCKERFILE, re.MULTILINE)
    return {requirement.name: requirement for requirement in map(Requirement, found)}


def test_the_image_has_the_versions_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {each.name: each for each in map(Requirement, project["dependencies"])}
    for name in ("torch", "ray", "deepspeed"):
        ((_, version),) = [(s.operator, s.version) for s in pins()[name].specifier]
        assert wanted[name].specifier.contains(version), f"{name} {version}: {wanted[name]}"
        assert pins()[name].extras >= wanted[name].extras
    extras = re.findall(r"^ARG EXTRAS=(\S+)", DOCKERFILE, re.MULTILINE)[0].split(",")
    assert set(extras) <= project["optional-dependencies"].keys()


def test_manifests_name_the_image_s_ray():
    for name in ("ray-cluster.yaml", "ray-job.yaml"):
        assert pins()["ray"].specifier.contains(ray_cluster(name)["rayVersion"])


def test_what_the_image_copies_is_there_and_in_its_context():
    allowed = (CLUSTER / "image" / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?:--\S+ )?(.+)", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in allowed
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[-1] == "1000"


# What Prometheus and Grafana show.


def metrics_of(expression: str) -> set[str]:
    """The names of the metrics in an expression.

    Raises:
        ValueError: it isn't PromQL.
    """
    # What Grafana fills in.
    expression = expression.replace("$__rate_interval", "1m")
    names: set[str] = set()

    def visit(each: Any) -> None:
        if isinstance(each, promql_parser.VectorSelector):
            names.add(each.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return names


def board_expressions() -> Iterator[str]:
    board = json.loads((CLUSTER / "dashboards" / "grafana.json").read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in board["templating"]["list"]:
        yield from re.findall(r"label_values\((\w+),", variable["query"])


def alerts() -> list[dict[str, Any]]:
    (group,) = document("dashboards/alerts.yaml")["groups"]
    return group["rules"]


def test_the_board_shows_what_the_code_exports_all_of_it_and_nothing_else():
    shown = set().union(*map(metrics_of, board_expressions()))
    assert shown == EXPORTED


def test_alerts_watch_what_the_code_exports():
    for rule in alerts():
        assert metrics_of(rule["expr"]) <= EXPORTED, rule["alert"]
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["annotations"].keys() == {"summary", "description"}
        if "for" in rule:
            promql_parser.parse_duration(rule["for"])


def test_everything_on_the_board_can_be_told_apart_by_run():
    for expression in [*board_expressions(), *(rule["expr"] for rule in alerts())]:
        if expression not in EXPORTED:
            assert expression.count(" by (run) ") == len(re.findall(r"ray_cat_ray_\w+", expression))


@pytest.mark.parametrize("expression", ["sum by (run (ray_cat_ray_fid)", "rate(ray_cat_ray_fid)"])
def test_what_is_not_promql_is_found(expression):
    with pytest.raises(ValueError):
        metrics_of(expression)


def test_prometheus_reads_the_file_that_ray_writes():
    content = document("dashboards/prometheus.yaml")
    (job,) = content["scrape_configs"]
    (file,) = job["file_sd_configs"][0]["files"]
    assert file == f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    assert [(CLUSTER / "dashboards" / name).exists() for name in content["rule_files"]] == [True]


def test_the_pod_monitor_finds_every_pod_and_its_port():
    content = document("dashboards/pod-monitor.yaml")
    check(content, "pod_monitor.yaml")
    (endpoint,) = content["spec"]["podMetricsEndpoints"]
    for template in pods(ray_cluster("ray-cluster.yaml")).values():
        selector = content["spec"]["selector"]["matchLabels"]
        assert selector and selector.items() <= template["metadata"]["labels"].items()
        assert endpoint["port"] in {port["name"] for port in container(template)["ports"]}
    content["spec"]["podMetricsEndpoint"] = []
    with pytest.raises(jsonschema.ValidationError):
        check(content, "pod_monitor.yaml")


# All of it.

FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_there_are_no_secrets(path):
    keys = r"AKIA[0-9A-Z]{16}|-----BEGIN|AIza[\w-]{35}"
    values = r"(?i:password|secret_?key|auth_token): *[\"']?\w"
    assert not re.search(f"{keys}|{values}", path.read_text())


# What clouds and Kubernetes write in capitals.
WORDS = {"ALL", "CPU", "DELETE", "GPU", "PERSISTENT", "SPOT", "TERMINATE"}


def test_the_readme_says_what_every_placeholder_is():
    """A placeholder is a word of capitals outside of comments."""
    files = [path for path in FILES if path.parent.name in ("kuberay", "ray")]
    lines = [line.split("# ")[0] for path in files for line in path.read_text().splitlines()]
    used = set(re.findall(r"(?<![\w$])[A-Z]{2,}(?:_[A-Z]+)?(?!\w)", "\n".join(lines)))
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    assert used - WORDS == set(re.findall(r"[A-Z_]+", " ".join(rows)))
