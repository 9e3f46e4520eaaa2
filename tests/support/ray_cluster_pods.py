"""Pods as KubeRay's controller makes them of a RayCluster, by its sources (1.5)."""

from __future__ import annotations

from copy import deepcopy

GCS_PORT = "6379"
DASHBOARD_AGENT_PORT = "52365"
METRICS_PORT = "8080"
UID = "00000000-0000-4000-8000-000000000001"
"""Of the RayCluster, by which its part of Redis is called."""
OVERWRITE = "ray.io/overwrite-container-cmd"
REDIS_ADDRESS = "RAY_REDIS_ADDRESS"
OWNER = "ray.io/originated-from-crd"
OF_RAYSERVICE = {
    "RAY_SERVE_KV_TIMEOUT_S": "5", "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_timeout_ms_task_wait_for_death_info": "0",
}  # fmt: skip
SHELL = ["/bin/bash", "-c", "--"]
WAIT_FOR_HEAD = "until ray health-check --address {address}; do sleep 1; done"


def head_service(cluster: dict) -> str:
    """Name of the Service that it makes for the head."""
    return f"{cluster['metadata']['name']}-head-svc"


def refused(cluster: dict) -> str | None:
    """Why the controller would make no pods, if it would not: checks that no schema has."""
    spec = cluster["spec"]
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    has_redis = any(each["name"] == REDIS_ADDRESS for each in head["env"])
    options = "gcsFaultToleranceOptions" in spec
    said = "ray.io/ft-enabled" in cluster["metadata"].get("annotations", {})
    if has_redis and options:
        return f"{REDIS_ADDRESS} beside gcsFaultToleranceOptions"
    if has_redis and not said:
        return f"{REDIS_ADDRESS} without gcsFaultToleranceOptions"
    if said and options:
        return "ray.io/ft-enabled beside gcsFaultToleranceOptions"
    if any(each["name"] in ("REDIS_USERNAME", "REDIS_PASSWORD") for each in head["env"]):
        return "Redis' user and password are of gcsFaultToleranceOptions"
    return None


def pods_of(cluster: dict) -> list[tuple[str, dict]]:
    """(name, pod) of the head and of all workers. Raises AssertionError when it is refused."""
    reason = refused(cluster)
    assert reason is None, reason
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    made = [(f"{name}-head", _pod(cluster, spec["headGroupSpec"]))]
    for group in spec["workerGroupSpecs"]:
        for number in range(group["replicas"]):
            pod = f"{name}-{group['groupName']}-worker-{number:05d}"
            made.append((pod, _pod(cluster, group)))
    return made


def _pod(cluster: dict, group: dict) -> dict:
    """A pod of a group; the head's has no name of its own."""
    pod = deepcopy(group["template"])
    is_head, (container, *_) = "groupName" not in group, pod["spec"]["containers"]
    host = f"{head_service(cluster)}.{cluster['metadata']['namespace']}.svc.cluster.local"
    pod["metadata"]["labels"] |= {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": "head" if is_head else "worker",
        "ray.io/group": group.get("groupName", "headgroup"),
    }
    if not is_head:
        pod["spec"].setdefault("initContainers", []).append(_wait_for_head(container, host))
    start = _ray_start(group, host)
    if cluster["metadata"].get("annotations", {}).get(OVERWRITE) != "true":
        own = " ".join([*container.get("command", ()), *container.get("args", ())])
        container["command"] = SHELL
        container["args"] = [
            " && ".join(part for part in (own, "ulimit -n 65536; " + start) if part)
        ]
    container["env"] += _environment(cluster, is_head, host)
    container["env"].append({"name": "KUBERAY_GEN_RAY_START_CMD", "value": start})
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/dev/shm" in mounted, "it would mount one as large as the container's memory"
    return pod


def _wait_for_head(container: dict, host: str) -> dict:
    """What runs before a worker: with its image, environment and mounts."""
    copied = {key: deepcopy(container[key]) for key in ("image", "env", "volumeMounts")}
    script = WAIT_FOR_HEAD.format(address=f"{host}:{GCS_PORT}")
    return {"name": "wait-gcs-ready", "command": SHELL, "args": [script]} | copied


def _ray_start(group: dict, host: str) -> str:
    """The command that runs unless the pods bring their own."""
    is_head = "groupName" not in group
    set_here = {"dashboard-host": "0.0.0.0"} if is_head else {"address": f"{host}:{GCS_PORT}"}
    set_here |= {"metrics-export-port": METRICS_PORT}
    set_here |= {"dashboard-agent-listen-port": DASHBOARD_AGENT_PORT}
    options = set_here | group["rayStartParams"] | {"block": "true"}
    flags = [f"--{key}" if value == "true" else f"--{key}={value}"
             for key, value in sorted(options.items()) if value != "false"]  # fmt: skip
    return " ".join(["ray start", *(["--head"] if is_head else []), *flags])


def _environment(cluster: dict, is_head: bool, host: str) -> list[dict]:
    """What it adds to the first container's."""
    redis = cluster["spec"].get("gcsFaultToleranceOptions", {})
    texts = {"RAY_PORT": GCS_PORT, "RAY_USAGE_STATS_KUBERAY_IN_USE": "1"}
    if cluster["metadata"].get("labels", {}).get(OWNER) == "RayService":
        texts |= OF_RAYSERVICE
    if is_head:
        texts["RAY_ADDRESS"] = f"127.0.0.1:{GCS_PORT}"
    else:
        texts |= {"FQ_RAY_IP": host, "RAY_IP": host.partition(".")[0]}
        texts["RAY_ADDRESS"] = f"{host}:{GCS_PORT}"
    if redis and is_head:
        texts |= {REDIS_ADDRESS: redis["redisAddress"], "RAY_external_storage_namespace": UID}
    elif redis:
        texts["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
    made = [{"name": name, "value": value} for name, value in texts.items()]
    if is_head and "redisPassword" in redis:
        made.append({"name": "REDIS_PASSWORD"} | redis["redisPassword"])
    for name, path in (
        ("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        ("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
        ("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
    ):
        made.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
    return made
