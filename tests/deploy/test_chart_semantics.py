"""What schemas of Kubernetes do not see: objects of a render that must fit each other."""

from __future__ import annotations

import re

import pytest
import yaml
from manifests import NAMESPACE, ROOT, VALUE_SETS, Render, pod_templates, ray_cluster, render

from quire.config.fleet import fleet_from
from quire.config.transfer import TransferConfig
from quire.router.coordinated import FOLLOW_S
from quire.router.readiness_gate import CONDITION

QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([a-zA-Z]*)")
SUFFIXES = {
    "": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30,
    "Ti": 2**40,
}  # fmt: skip
COMPONENT = "app.kubernetes.io/component"
GIVEN = {
    "Secret": {
        "hf-token", "hf", "keys", "token", "certificates", "registry", "tls", "llm-tls", "redis",
    }
}  # fmt: skip
GIVEN["PersistentVolumeClaim"] = {"models"}
"""What the values name as existing."""
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.fixture(params=VALUE_SETS)
def rendered(request) -> Render:
    return render(*VALUE_SETS[request.param])


def amount(text: object) -> float:
    digits, suffix = QUANTITY.fullmatch(str(text)).groups()
    return float(digits) * SUFFIXES[suffix]


def is_subset(selector: dict, labels: dict) -> bool:
    return selector.items() <= labels.items()


def containers(rendered: Render):
    for name, pod in rendered.pods:
        for container in pod["spec"]["containers"]:
            yield name, pod["spec"], container


def is_follower(spec: dict) -> bool:
    """A pod of a group that is not the leader: it runs ranks for that, and is not called."""
    return "--master-addr=$(LWS_LEADER_ADDRESS)" in spec["containers"][0].get("args", ())


def asked(probe: dict) -> dict:
    """What a probe asks, over HTTP or by connecting."""
    return probe.get("httpGet") or probe["tcpSocket"]


def exists(rendered: Render, kind: str, name: str) -> bool:
    return name in GIVEN.get(kind, ()) or rendered.named(kind, name) is not None


def test_objects_are_named_once_and_live_in_the_releases_namespace(rendered) -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in rendered.objects]
    assert len(names) == len(set(names))
    for o in rendered.objects:
        assert o["metadata"].get("namespace", NAMESPACE) == NAMESPACE
        most = 52 if o in rendered.workloads else 63 if o["kind"] == "Service" else 253
        assert len(o["metadata"]["name"]) <= most, "a pod's name adds a number or a hash"
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", o["metadata"]["name"])


def test_selectors_choose_their_own_pods_and_no_others(rendered) -> None:
    for workload in rendered.of("Deployment", "StatefulSet"):
        selector = workload["spec"]["selector"]["matchLabels"]
        chosen = [n for n, p in rendered.pods if is_subset(selector, p["metadata"]["labels"])]
        assert chosen == [workload["metadata"]["name"]]


def test_services_policies_and_budgets_choose_pods_that_exist(rendered) -> None:
    selectors = [(o, o["spec"]["selector"]) for o in rendered.of("Service")]
    selectors += [
        (o, o["spec"]["selector"]["matchLabels"])
        for o in rendered.of("PodDisruptionBudget", "PodMonitor", "ServiceMonitor", "InferencePool")
    ]
    policies = rendered.of("NetworkPolicy")
    selectors += [(o, o["spec"]["podSelector"]["matchLabels"]) for o in policies]
    labels = [pod["metadata"]["labels"] for _, pod in rendered.pods]
    labels += [o["metadata"]["labels"] for o in rendered.of("Service")]
    assert selectors
    for o, selector in selectors:
        assert any(is_subset(selector, each) for each in labels), (o["kind"], selector)


def test_named_ports_exist(rendered) -> None:
    for service in rendered.of("Service"):
        for _, pod in rendered.pods:
            if is_subset(service["spec"]["selector"], pod["metadata"]["labels"]):
                known = {p["name"] for c in pod["spec"]["containers"] for p in c["ports"]}
                targets = {p["targetPort"] for p in service["spec"]["ports"]}
                # a pod without a Service's port has a name by it, and is no endpoint of it
                assert targets & known == (set() if is_follower(pod["spec"]) else targets)
    for _, _, container in containers(rendered):
        known = {p["name"] for p in container.get("ports", ())}
        for probe in PROBES:
            if probe in container:
                assert asked(container[probe])["port"] in known
    for policy in rendered.of("NetworkPolicy"):
        selector = policy["spec"]["podSelector"]["matchLabels"]
        for _, pod in rendered.pods:
            if is_subset(selector, pod["metadata"]["labels"]) and not is_follower(pod["spec"]):
                ports = [p for c in pod["spec"]["containers"] for p in c["ports"]]
                known = {p["name"] for p in ports} | {p["containerPort"] for p in ports}
                for rule in policy["spec"]["ingress"]:
                    assert {p["port"] for p in rule.get("ports", ())} <= known
    for monitor in rendered.of("PodMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        pods = [p for _, p in rendered.pods if is_subset(selector, p["metadata"]["labels"])]
        ports = {
            p["name"] for pod in pods for c in pod["spec"]["containers"] for p in c.get("ports", ())
        }
        assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_backends_of_routes_exist(rendered) -> None:
    for ingress in rendered.of("Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                service = rendered.named("Service", backend["name"])
                assert backend["port"]["name"] in [p["name"] for p in service["spec"]["ports"]]
    for route in rendered.of("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert rendered.named(backend.get("kind", "Service"), backend["name"])


def test_mounts_have_volumes_and_volumes_have_sources(rendered) -> None:
    for _, spec, container in containers(rendered):
        volumes = {v["name"]: v for v in spec["volumes"]}
        mounts = {m["name"] for m in container["volumeMounts"]}
        assert mounts == set(volumes), "each volume is mounted, each mount has one"
        paths = [m["mountPath"] for m in container["volumeMounts"]]
        assert len(paths) == len(set(paths))
        for volume in volumes.values():
            if "configMap" in volume:
                assert exists(rendered, "ConfigMap", volume["configMap"]["name"])
            if "secret" in volume:
                assert exists(rendered, "Secret", volume["secret"]["secretName"])
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert exists(rendered, "PersistentVolumeClaim", claim)


def test_secrets_exist_with_their_keys_and_are_no_arguments(rendered) -> None:
    for _, _, container in containers(rendered):
        for variable in container["env"]:
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                assert exists(rendered, "Secret", reference["name"])
                own = rendered.named("Secret", reference["name"])
                assert own is None or reference["key"] in own["data"]
        names = [v["name"] for v in container["env"]]
        assert len(names) == len(set(names))
        assert not any("token" in arg or "key" in arg for arg in container.get("args", ()))
    for config in rendered.of("ConfigMap"):
        for secret in rendered.of("Secret"):
            for value in secret["data"].values():
                assert value not in str(config["data"])


def test_only_who_reads_models_knows_the_hugging_face_token(rendered) -> None:
    for name, _, container in containers(rendered):
        knows = any(variable["name"] == "HF_TOKEN" for variable in container["env"])
        assert not (knows and name.endswith(("-router", "-test")))


def test_accounts_exist_and_who_asks_kubernetes_may(rendered) -> None:
    asks = "kubernetes_service:" in rendered.text
    slices = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"],
              "verbs": ["list", "watch"]}  # fmt: skip
    told = {"deletion_cost: true": "pods", "readiness_gate: true": "pods/status"}
    for role in rendered.of("Role"):
        own = role["metadata"]["name"].endswith("-router")
        patched = [
            {"apiGroups": [""], "resources": [resource], "verbs": ["patch"]}
            for option, resource in told.items() if option in rendered.text
        ]  # fmt: skip
        assert role["rules"] == (patched if own else [slices])
        assert role["rules"]
    for binding in rendered.of("RoleBinding"):
        if binding["roleRef"]["name"].endswith("-router"):
            (subject,) = binding["subjects"]
            users = [p["metadata"]["labels"][COMPONENT] for _, p in rendered.pods
                     if p["spec"]["serviceAccountName"] == subject["name"]]  # fmt: skip
            assert users == ["router"], "nobody else may change pods"
    for binding in rendered.of("RoleBinding"):
        assert rendered.named("Role", binding["roleRef"]["name"])
        for subject in binding["subjects"]:
            assert exists(rendered, subject["kind"], subject["name"])
    assert bool(rendered.of("RoleBinding")) == asks
    for _, pod in rendered.pods:
        assert exists(rendered, "ServiceAccount", pod["spec"]["serviceAccountName"])
        mounted = pod["spec"]["automountServiceAccountToken"]
        assert mounted is (asks and pod["metadata"]["labels"][COMPONENT] in ("gateway", "router"))


def test_a_readiness_gate_is_opened_by_routers(rendered) -> None:
    told = "readiness_gate: true" in rendered.text
    for _, pod in rendered.pods:
        gates = pod["spec"].get("readinessGates", [])
        role = pod["metadata"]["labels"][COMPONENT]
        waits = told and role in ("unified", "prefill", "decode") and not is_follower(pod["spec"])
        assert gates == ([{"conditionType": CONDITION}] if waits else [])


def test_requests_are_given_and_within_limits(rendered) -> None:
    for _, _, container in containers(rendered):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        for resource in ("cpu", "memory"):
            assert amount(requests[resource]) <= amount(limits[resource])
        for extended in (set(requests) | set(limits)) - {"cpu", "memory"}:
            assert requests[extended] == limits[extended]


def test_three_probes_and_a_start_that_may_take_long(rendered) -> None:
    for _, spec, container in containers(rendered):
        if spec.get("restartPolicy") == "Never":
            continue  # the test
        if is_follower(spec):
            assert not set(PROBES) & set(container), "nothing answers there"
            continue
        probes = [container[p] for p in PROBES]
        seen = [(str(asked(p)), p["periodSeconds"], p["failureThreshold"]) for p in probes]
        assert len(set(seen)) == 3
        if "httpGet" in probes[0]:
            assert asked(probes[1])["path"] != asked(probes[2])["path"]
        budget = probes[0]["periodSeconds"] * probes[0]["failureThreshold"]
        assert budget >= 60


def test_a_pod_has_time_to_drain(rendered) -> None:
    for name, spec, container in containers(rendered):
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
        waited = float(command["command"][1]) if command else 0.0
        draining = drain_s(rendered, name)
        assert draining or name.endswith(("-router", "-coordinator", "-test"))
        assert draining == 0 or spec["terminationGracePeriodSeconds"] >= waited + draining + 10
    gateway = next(w for w in rendered.workloads if w["metadata"]["name"].endswith("-gateway"))
    assert "preStop" in gateway["spec"]["template"]["spec"]["containers"][0]["lifecycle"]


def drain_s(rendered: Render, name: str) -> float:
    """What the options of a pod say; with Ray those of its pool in the fleet."""
    config = rendered.named("ConfigMap", name)["data"]
    options = yaml.safe_load(next(iter(config.values()))) if "check.py" not in config else {}
    if "node.yaml" in config:
        (label,) = options["node_label"]
        pool = next(p for p in pools(rendered) if p["node_label"] == label)
        options = pool["engine"]
    return options.get("shutdown_timeout", 0) + options.get("drain_timeout_s", 0)


def pools(rendered: Render) -> list[dict]:
    """Of the fleet, if there is one."""
    for config in rendered.of("ConfigMap"):
        if "fleet.yaml" in config["data"]:
            (model,) = yaml.safe_load(config["data"]["fleet.yaml"])["models"]
            return model["pools"]
    return []


def test_a_fleet_is_what_the_coordinator_reads_and_fits_its_nodes(rendered) -> None:
    """One engine in each pod: a node offers what one replica of its pool needs."""
    for config in rendered.of("ConfigMap"):
        if "fleet.yaml" in config["data"]:
            token = TransferConfig(cluster_token="token")
            fleet_from(yaml.safe_load(config["data"]["fleet.yaml"]), token)
    for pool in pools(rendered):
        name = next(
            n for n, p in rendered.pods if p["metadata"]["labels"][COMPONENT] == pool["name"]
        )
        node = yaml.safe_load(rendered.named("ConfigMap", name)["data"]["node.yaml"])
        assert node["node_label"] == [pool["node_label"]]
        assert (node["cpus"], node["gpus"]) == (pool["cpus"], pool["gpus"])
        assert pool["cpus"] >= 1
        replicas = [
            w["spec"]["replicas"] for w in rendered.workloads if w["metadata"]["name"] == name
        ]
        replicas += [
            group["replicas"]
            for cluster in rendered.of("RayCluster", "RayService")
            for group in ray_cluster(cluster)["workerGroupSpecs"]
            if group["groupName"] == pool["name"]
        ]
        assert replicas == [pool["replicas"]]


def test_a_head_is_what_kuberay_finds(rendered) -> None:
    """Its Service has the ports of the first container; gateways and workers know it by names that
    KubeRay gives; the fleet of a RayService is one of several."""
    for cluster in rendered.of("RayCluster", "RayService"):
        name = cluster["metadata"]["name"]
        head, *groups = pod_templates(cluster)
        ray, coordinator = head["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in ray["ports"]}
        assert (ports["gcs"], ports["grpc"]) == (6379, 9200)
        assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
        for group in groups:
            assert "--join=$(FQ_RAY_IP):6379" in group["spec"]["containers"][0]["args"]
        followers = [c["data"] for c in rendered.of("ConfigMap") if "gateway.yaml" in c["data"]]
        for options in map(yaml.safe_load, [data["gateway.yaml"] for data in followers]):
            assert options["coordinator"] == f"{name}-head-svc.{NAMESPACE}.svc:9200"
        assert not any(v["name"] == "RAY_REDIS_ADDRESS" for v in ray["env"]), "KubeRay refuses it"
        if cluster["kind"] == "RayService":
            assert (ports["dashboard"], "serve" in ports) == (8265, True)
            assert {"--dashboard", "--node-label=quire.pool=coordinator"} < set(ray["args"])
            assert "--fleet-name=$(RAY_CLUSTER_NAME)" in coordinator["args"]
            assert all("persistentVolumeClaim" not in v for v in head["spec"]["volumes"])


def test_a_rayservice_waits_and_knows_rays_token(rendered) -> None:
    for service in rendered.of("RayService"):
        spec, (head, *groups) = service["spec"], pod_templates(service)
        (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
        (deployment,) = application["deployments"]
        selected = deployment["ray_actor_options"]["label_selector"]
        label = next(iter(f"{key}={value}" for key, value in selected.items()))
        assert f"--node-label={label}" in head["spec"]["containers"][0]["args"]
        module, _, attribute = application["import_path"].partition(":")
        source = (ROOT / "services" / (module.replace(".", "/") + ".py")).read_text()
        assert f"{attribute} = {deployment['name']}.bind()" in source
        given = spec["rayClusterConfig"]["authOptions"]["secretName"]
        for pod in (head, *groups):
            for container in pod["spec"]["containers"]:
                token = next(v for v in container["env"] if v["name"] == "RAY_AUTH_TOKEN")
                assert token["valueFrom"]["secretKeyRef"] == {"name": given, "key": "auth_token"}
        drains = [pool["engine"]["drain_timeout_s"] for pool in pools(rendered)]
        assert spec["rayClusterDeletionDelaySeconds"] >= FOLLOW_S + max(drains)
        policy = rendered.named("NetworkPolicy", f"{service['metadata']['name']}-coordinator")
        peers = [
            rule["from"]
            for rule in policy["spec"]["ingress"]
            if any(port["port"] == "dashboard" for port in rule.get("ports", ()))
        ]
        assert peers, "KubeRay's operator is let in"
        assert all(peers)


def test_pods_are_restricted(rendered) -> None:
    for _, spec, container in containers(rendered):
        pod, own = spec["securityContext"], container["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"]["drop"] == ["ALL"]
        assert set(own["capabilities"].get("add", ())) <= {"IPC_LOCK"}
        assert not spec.get("hostNetwork")
        assert not any("hostPath" in v for v in spec["volumes"])


def test_images_are_pinned(rendered) -> None:
    for _, _, container in containers(rendered):
        name, _, tag = container["image"].rpartition("@" if "@" in container["image"] else ":")
        assert name
        assert tag
        assert tag != "latest"


def test_what_is_scaled_has_no_replicas(rendered) -> None:
    scaled = {
        o["spec"]["scaleTargetRef"]["name"]: o
        for o in rendered.of("HorizontalPodAutoscaler", "ScaledObject")
    }
    for workload in rendered.workloads:
        name = workload["metadata"]["name"]
        assert ("replicas" in workload["spec"]) == (name not in scaled)
    for name, o in scaled.items():
        target = o["spec"]["scaleTargetRef"]
        assert rendered.named(target["kind"], name)["apiVersion"] == target["apiVersion"]
        for trigger in o["spec"].get("triggers", ()):
            assert trigger["metadata"]["query"].startswith("sum("), "KEDA wants one number"


def test_a_budget_lets_pods_move(rendered) -> None:
    replicas = {pool["name"]: pool["replicas"] for pool in pools(rendered)}
    for budget in rendered.of("PodDisruptionBudget"):
        if "minAvailable" in budget["spec"]:  # pods of a RayCluster
            role = budget["spec"]["selector"]["matchLabels"][COMPONENT]
            assert budget["spec"]["minAvailable"] < replicas[role]
        else:
            assert budget["spec"]["maxUnavailable"] >= 1


def test_workers_are_reached_by_names_that_exist(rendered) -> None:
    """A gateway's and a router's list against the StatefulSets, the groups, and their services."""
    named = rendered.of("StatefulSet", "LeaderWorkerSet")
    sets = {w["metadata"]["name"]: w for w in named}
    certificates = [s for s in rendered.of("Secret") if s.get("type") == "kubernetes.io/tls"]
    for config in rendered.of("ConfigMap"):
        for content in config.get("data", {}).values():
            options = (
                yaml.safe_load(content)
                if config["metadata"]["name"]
                in (*sets, *(w["metadata"]["name"] for w in rendered.workloads))
                else {}
            )
            for service in options.get("kubernetes_service", ()):
                ports = rendered.named("Service", service)["spec"]["ports"]
                assert "grpc" in [port["name"] for port in ports]
            for key in ("worker", "pod", "router"):
                for given in options.get(key, ()):
                    name, _, address = given.rpartition("=")
                    host, port = address.rsplit(":", 1)
                    pod, service, namespace, _ = host.split(".")
                    workload, number = pod.rsplit("-", 1)
                    assert key == "router" or name == pod
                    # a group's is called as it is, where its subdomain is shared
                    assert sets[workload]["spec"].get("serviceName", workload) == service
                    assert namespace == NAMESPACE
                    service_ports = rendered.named("Service", service)["spec"]["ports"]
                    assert int(port) in [p["port"] for p in service_ports]
                    most = sets[workload]["spec"].get("replicas", 99)
                    assert int(number) < most
    assert len(certificates) <= 1


def test_only_the_gateway_is_open(rendered) -> None:
    policies = {}
    for policy in rendered.of("NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        policies[policy["spec"]["podSelector"]["matchLabels"][COMPONENT]] = policy
    for component in {t["metadata"]["labels"][COMPONENT] for _, t in rendered.pods} - {"test"}:
        rules = policies[component]["spec"]["ingress"]
        if component != "gateway":
            assert all(rule.get("from") for rule in rules), "from everywhere"
        for rule in rules:
            ports = [port["port"] for port in rule.get("ports", ())]
            if not ports or {9200, 9300} & set(ports):
                sources = {peer["podSelector"]["matchLabels"][COMPONENT] for peer in rule["from"]}
                assert sources <= {"unified", "prefill", "decode", "coordinator"}


def test_every_rank_of_a_pod_is_reached(rendered) -> None:
    """Rank n listens for KV blocks n ports behind the first."""
    for workload in rendered.workloads:
        name = workload["metadata"]["name"]
        config = rendered.named("ConfigMap", name)["data"].get("worker.yaml")
        policy = rendered.named("NetworkPolicy", name)
        if config and policy:
            options = yaml.safe_load(config)
            size = options["tensor_parallel_size"]
            assert options["kv_grpc_port"] - options["kv_tcp_port"] >= size
            ranges = {
                (port["port"], port["endPort"])
                for rule in policy["spec"]["ingress"]
                for port in rule.get("ports", ())
                if "endPort" in port
            }
            firsts = (options["kv_tcp_port"], options["kv_grpc_port"])
            assert ranges == {(first, first + size - 1) for first in firsts}


def test_a_group_is_one_replica(rendered) -> None:
    """As many ranks in each pod; who is lost takes the others along; the leader alone is called."""
    for group in rendered.of("LeaderWorkerSet"):
        name, made = group["metadata"]["name"], group["spec"]["leaderWorkerTemplate"]
        options = yaml.safe_load(rendered.named("ConfigMap", name)["data"]["worker.yaml"])
        leader, follower = (t["spec"] for t in pod_templates(group))
        assert made["restartPolicy"] == "RecreateGroupOnPodRestart"
        assert group["spec"]["startupPolicy"] == "LeaderCreated", "it is ready when all are"
        for spec, master in ((leader, "$(POD_IP)"), (follower, "$(LWS_LEADER_ADDRESS)")):
            (container,) = spec["containers"]
            assert {"--nnodes=$(LWS_GROUP_SIZE)", "--node-rank=$(LWS_WORKER_INDEX)",
                    f"--master-addr={master}"} < set(container["args"])  # fmt: skip
            gpus = container["resources"]["limits"]["nvidia.com/gpu"]
            assert gpus * made["size"] == options["tensor_parallel_size"]
        ports = {p["name"]: p["containerPort"] for p in leader["containers"][0]["ports"]}
        assert ports["ranks"] == options["master_port"]
        only_leader = {"grpc", "status", "ranks"}
        assert {p["name"] for p in follower["containers"][0]["ports"]} == set(ports) - only_leader
        same = ("terminationGracePeriodSeconds", "volumes", "securityContext", "serviceAccountName")
        assert [leader[key] for key in same] == [follower[key] for key in same]
        assert leader["containers"][0]["env"] == follower["containers"][0]["env"]


def test_pods_of_a_group_reach_each_other_at_any_port(rendered) -> None:
    for group in rendered.of("LeaderWorkerSet"):
        policy = rendered.named("NetworkPolicy", group["metadata"]["name"])
        own = {"podSelector": policy["spec"]["podSelector"]}
        assert {"from": [own]} in policy["spec"]["ingress"]
