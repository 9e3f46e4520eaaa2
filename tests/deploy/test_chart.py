"""The chart as helm and Kubernetes' own schemas see it."""

from __future__ import annotations

import base64
import json
import re
import subprocess

import pytest
import yaml
from manifests import (
    CHART,
    CUSTOM,
    EXAMPLES,
    GROUPS,
    RELEASE,
    VALUE_SETS,
    helm,
    pod_templates,
    render,
    tool,
)

from quire.cli.chart.__main__ import files

KUBE_VERSIONS = ("1.28.0", "1.33.0", "1.37.0")


@pytest.mark.parametrize("name", VALUE_SETS)
def test_it_lints(name) -> None:
    args = [arg for path in VALUE_SETS[name] for arg in ("-f", str(path))]
    done = helm("lint", "--strict", str(CHART), *args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[" not in done.stdout, done.stdout


@pytest.mark.parametrize("kube", KUBE_VERSIONS)
@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_object_is_valid(name, kube) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    checked = 0
    for each in render(*VALUE_SETS[name], kube=kube).objects:
        if each["kind"] in CUSTOM:
            jsonschema.validate(each, CUSTOM[each["kind"]])
            for template in pod_templates(each):
                pod = {"apiVersion": "v1", "kind": "Pod"} | template
                validate.validate(pod, kube.rpartition(".")[0], strict=True)
            continue
        # a version that this kind is not known in raises too: nothing is only warned of
        validate.validate(each, kube.rpartition(".")[0], strict=True)
        checked += 1
    assert checked >= 12


def test_a_misspelt_field_of_an_object_is_found() -> None:
    """The check above sees what it is for."""
    validate = pytest.importorskip("kubernetes_validate")
    service = render().of("Service")[0]
    with pytest.raises(validate.ValidationError, match="clusterIp"):
        validate.validate(service | {"spec": {"clusterIp": "None"}}, "1.33", strict=True)


def test_every_kind_is_rendered_and_a_misspelt_field_of_a_custom_one_is_found() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    rendered = render(*VALUE_SETS["everything"])
    shown = {each["kind"] for each in rendered.objects}
    assert set(CUSTOM) - {"ServiceMonitor", "RayCluster", "RayService"} <= shown
    for kind in set(CUSTOM) & shown:
        each = rendered.of(kind)[0]
        jsonschema.validate(each, CUSTOM[kind])
        broken = each | {"spec": each["spec"] | {"minReplicas": 1}}
        with pytest.raises(jsonschema.ValidationError, match="minReplicas"):
            jsonschema.validate(broken, CUSTOM[kind])


@pytest.mark.parametrize(
    ("kind", "was", "broken"),
    [
        ("PodMonitor", '"interval": "15s"', '"interval": "15 seconds"'),
        ("PodMonitor", '"port": "status"', '"port": 9090'),
        ("PrometheusRule", '"expr"', '"expression"'),
        ("HTTPRoute", '"type": "PathPrefix"', '"type": "Prefix"'),
    ],
)
def test_what_an_operator_would_refuse_is_refused_here(kind, was, broken) -> None:
    """The upstream schemas know more than names."""
    jsonschema = pytest.importorskip("jsonschema")
    text = json.dumps(render(*VALUE_SETS["everything"]).of(kind)[0])
    assert was in text
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(text.replace(was, broken)), CUSTOM[kind])


def test_the_generated_files_are_current() -> None:
    for path, content in files(CHART).items():
        assert path.read_text() == content, "run: python -m quire.cli.chart helm/quire"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("gateway.replicsa=2", "replicsa"),
        ("gatway.replicas=2", "gatway"),
        ("engine.options.max_modle_len=4096", "max_modle_len"),
        ("engine.options.model=demo", "model"),
        ("roles.decode.transfer.kv_lease=4", "kv_lease"),
        ("router.options.routing_policy=foo", "routing_policy"),
        ("engine.options.kv_cache_memory_bytes=4Q", "kv_cache_memory_bytes"),
        ("engine.accelerator=tpu", "accelerator"),
        ("roles.decode.replicas=two", "replicas"),
        ("roles.encode.replicas=1", "encode"),
        ("gateway.resources.limits.cpu=two", "cpu"),
        ("roles.prefill.replicas=1,roles.decode.replicas=0", "prefill pods alone"),
        ("roles.unified.replicas=0", "no pod to serve the model"),
        ("ray.enabeld=true", "enabeld"),
        ("engine.workload=DaemonSet", "workload"),
        ("engine.workload=Deployment", "needs discovery kubernetes"),
        (
            "engine.workload=Deployment,discovery=kubernetes,cluster.tls.enabled=true",
            "goes without cluster.tls",
        ),
        ("router.readinessGate=true", "it needs discovery kubernetes"),
        ("router.readinessGate=true,discovery=kubernetes,router.enabled=false", "router.enabled"),
        ("ray.coordinator.options.orphan=1", "orphan"),
        ("ray.coordinator.options.listen=x", "listen"),
        ("ray.kuberay.enabled=true", "set ray.enabled too"),
        ("ray.enabled=true,discovery=kubernetes", "the coordinator says where pods are"),
        (
            "ray.enabled=true,ray.kuberay.enabled=true,cluster.tls.enabled=true",
            "pods of a RayCluster have none",
        ),
        ("ray.kuberay.kind=RayJob", "kind"),
        (
            "ray.enabled=true,ray.kuberay.enabled=true,ray.kuberay.kind=RayService,"
            "ray.persistence.existingClaim=c",
            "two clusters of a RayService would write to it",
        ),
        ("ray.enabled=true,roles.unified.options.log_level=debug", "for all roles"),
        ("ray.enabled=true,roles.unified.transfer.kv_lease_s=4", "for all roles"),
        (
            "ray.enabled=true,roles.unified.autoscaling.enabled=true,"
            "roles.unified.autoscaling.maxReplicas=2",
            "a fixed number of pods",
        ),
        ("engine.hosts=2", "tensorParallel 1 cannot be split evenly over 2 pods"),
        ("engine.hosts=0", "hosts"),
        (
            "engine.hosts=2,engine.tensorParallel=2,engine.workload=Deployment,discovery=kubernetes",
            "pods of a Deployment are no group",
        ),
        (
            "engine.hosts=2,engine.tensorParallel=2,ray.enabled=true",
            "a LeaderWorkerSet needs no Ray",
        ),
        (
            "roles.unified.hosts=2,engine.tensorParallel=2",
            f"the cluster does not know {GROUPS}",
        ),
        ("gateway.httpRoute.enabled=true", "parentRefs"),
        ("gateway.inferencePool.enabled=true", "endpointPicker"),
        (
            "roles.decode.autoscaling.enabled=true,roles.decode.autoscaling.minReplicas=3,"
            "roles.decode.autoscaling.maxReplicas=2",
            "maxReplicas 2 is less than minReplicas 3",
        ),
        (
            "roles.decode.autoscaling.enabled=true,roles.decode.autoscaling.kind=keda,"
            "roles.decode.autoscaling.maxReplicas=2",
            "prometheusUrl",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(setting, said) -> None:
    known = [] if GROUPS in said else ["--api-versions", GROUPS]
    done = helm("template", RELEASE, str(CHART), "--set", setting, *known)
    assert done.returncode != 0
    assert said in done.stderr


def test_values_of_the_chart_carry_the_schema_into_a_package(tmp_path) -> None:
    done = helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    refused = helm("template", RELEASE, str(package), "--set", "gateway.replicsa=2")
    assert "replicsa" in refused.stderr


def test_one_line_makes_it_disaggregated() -> None:
    roles = {}
    for config in render(sets=("roles.prefill.replicas=1",)).of("ConfigMap"):
        if "worker.yaml" in config["data"]:
            options = yaml.safe_load(config["data"]["worker.yaml"])
            roles[options["role"]] = options["device"]
    assert roles == {"prefill": "cpu", "decode": "cpu"}


def test_two_lines_make_it_disaggregated_on_gpus() -> None:
    rendered = render(sets=("engine.accelerator=nvidia", "roles.prefill.replicas=1"))
    for role in ("prefill", "decode"):
        config = rendered.named("ConfigMap", f"{RELEASE}-quire-{role}")["data"]["worker.yaml"]
        assert yaml.safe_load(config)["device"] == "cuda"
        workers = rendered.named("StatefulSet", f"{RELEASE}-quire-{role}")
        (container,) = workers["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert container["image"].endswith("-cuda")


def test_a_pod_has_as_many_gpus_as_share_the_model() -> None:
    rendered = render(sets=("engine.accelerator=nvidia", "engine.tensorParallel=2"))
    workers = rendered.named("StatefulSet", f"{RELEASE}-quire-unified")
    (container,) = workers["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["image"].endswith("-cuda")
    config = rendered.named("ConfigMap", f"{RELEASE}-quire-unified")["data"]["worker.yaml"]
    options = yaml.safe_load(config)
    assert (options["device"], options["tensor_parallel_size"]) == ("cuda", 2)


def test_the_gpus_of_a_replica_are_shared_out_over_its_pods() -> None:
    rendered = render(
        sets=("engine.accelerator=nvidia", "engine.tensorParallel=8", "engine.hosts=4")
    )
    group = rendered.named("LeaderWorkerSet", f"{RELEASE}-quire-unified")
    assert group["spec"]["leaderWorkerTemplate"]["size"] == 4
    for pod in pod_templates(group):
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert not rendered.named("StatefulSet", f"{RELEASE}-quire-unified")


def test_a_start_may_take_as_long_as_the_model_is_large() -> None:
    def budget(gib: int) -> int:
        rendered = render(sets=(f"model.sizeGiB={gib}",))
        workers = rendered.named("StatefulSet", f"{RELEASE}-quire-unified")
        probe = workers["spec"]["template"]["spec"]["containers"][0]["startupProbe"]
        return probe["periodSeconds"] * probe["failureThreshold"]

    assert budget(1) >= 120 + 10
    assert budget(140) >= 120 + 1433


def test_a_role_overrides_what_all_have() -> None:
    rendered = render(
        sets=("engine.options.max_num_seqs=8", "engine.options.max_model_len=512",
              "roles.prefill.replicas=1", "roles.prefill.options.max_num_seqs=2")
    )  # fmt: skip
    seen = {}
    for role in ("prefill", "decode"):
        config = rendered.named("ConfigMap", f"{RELEASE}-quire-{role}")["data"]["worker.yaml"]
        options = yaml.safe_load(config)
        seen[role] = (options["max_num_seqs"], options["max_model_len"])
    assert seen == {"prefill": (2, 512), "decode": (8, 512)}


def test_scaled_pods_are_known_by_name_beforehand() -> None:
    path = next(path for path in EXAMPLES if path.stem == "autoscaled")
    sets = ("discovery=static", "roles.decode.workload=StatefulSet")
    config = render(path, sets=sets).named("ConfigMap", f"{RELEASE}-quire-gateway")["data"][
        "gateway.yaml"
    ]
    assert len(yaml.safe_load(config)["worker"]) == 4 + 8


def test_a_generated_certificate_is_for_the_names_in_use() -> None:
    rendered = render(sets=("cluster.tls.enabled=true", "roles.prefill.replicas=1"))
    secret = rendered.named("Secret", f"{RELEASE}-quire-cluster-tls")
    shown = subprocess.run(
        [tool("openssl"), "x509", "-noout", "-ext", "subjectAltName"],
        input=base64.b64decode(secret["data"]["tls.crt"]),
        capture_output=True, timeout=30, check=True,
    )  # fmt: skip
    wildcards = re.findall(r"DNS:([^,\s]+)", shown.stdout.decode())
    config = rendered.named("ConfigMap", f"{RELEASE}-quire-gateway")["data"]["gateway.yaml"]
    for given in yaml.safe_load(config)["worker"]:
        host = given.partition("=")[2].rpartition(":")[0]
        assert "*." + host.partition(".")[2] in wildcards


def notes(*args: str) -> str:
    done = helm("install", RELEASE, str(CHART), "--dry-run=client", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


def test_notes_show_a_command_and_warn_of_what_the_values_lack() -> None:
    text = notes("--set", "gateway.auth.enabled=false,gateway.service.type=LoadBalancer")
    assert "curl -N http://127.0.0.1:8000/v1/chat/completions" in text
    assert "anyone who reaches the gateway may use it, and it is exposed" in text
    assert "gateway.replicas is 1" in text
    assert "Authorization" not in text
    body = text.partition("-d '")[2].partition("'")[0]
    assert json.loads(body)["model"] == "demo"
    safe = notes(
        "--set",
        "gateway.replicas=2,cluster.tls.enabled=true,cluster.tls.existingSecret=certificates",
    )
    assert "WARNING" not in safe
    assert "Authorization" in safe
