"""Every value of the chart, once: what it means and what it may be."""

from __future__ import annotations

from quire.cli.chart.schema import (
    QUANTITY_PATTERN,
    Schema,
    block,
    flag,
    free,
    labels,
    many,
    number,
    options,
    text,
    whole,
)
from quire.config.engine import EngineConfig
from quire.config.fleet import CoordinatorConfig
from quire.config.gateway import GatewayConfig
from quire.config.logs import LogConfig
from quire.config.router import RouterConfig
from quire.config.transfer import TransferConfig

FOLLOWS_ELSEWHERE = (
    "model", "tokenizer", "revision", "device", "drain_timeout_s", "tensor_parallel_size",
)  # fmt: skip
"""Engine options that other values decide."""
PLACES = (
    "kv_host", "kv_advertised_host", "kv_tcp_port", "kv_grpc_port",
    "cluster_token", "cluster_tls_cert", "cluster_tls_key", "cluster_tls_ca",
)  # fmt: skip
GATEWAY_OWN = (
    "host", "port", "uds", "ssl_keyfile", "ssl_certfile", "api_key", "allow_unauthenticated",
    "served_model_name", "shutdown_timeout",
)  # fmt: skip
COORDINATOR_OWN = ("fleet", "ray", "ray_cpus", "listen", "state_dir", "http_port")
IMAGES = ("gateway", "cpu", "nvidia", "coordinator")
K8S = "As in a Pod's specification."


def schema() -> Schema:
    """JSON Schema of values.yaml."""
    return {
        "$schema": "https://json-schema.org/draft-07/schema#",
        "title": "Values of the Quire chart",
    } | block(
        "Values of the Quire chart.",
        **_general(), model=_model(), **_workers(), router=_router(), gateway=_gateway(),
        ray=_ray(), **_cluster(), monitoring=_monitoring(), **_safety(),
    )  # fmt: skip


def _general() -> dict[str, Schema]:
    per_image = {name: text(f"For the {name} image.") for name in IMAGES}
    return {
        "global": free("Helm passes it to charts inside others; not read."),
        "nameOverride": text("In place of the chart's name."),
        "fullnameOverride": text("In place of release and chart name."),
        "commonLabels": labels("Labels of every object and pod."),
        "image": block(
            "Images. The name is registry/repository:tag-flavour, or @digest.",
            registry=text("Registry host."),
            repository=text("Name of the image."),
            tag=text("Tag without flavour; the chart's appVersion by default."),
            flavours=block("What the tag ends in.", **per_image),
            digests=block("sha256 digests; they win over tags.", **per_image),
            pullPolicy=text("When to pull.", "Always", "IfNotPresent", "Never"),
            pullSecrets=many(K8S, free("Name of a Secret.")),
        ),
        "extraObjects": many("Further objects, deployed as they are.", free("An object.")),
        "tests": block("`helm test`.", enabled=flag("Deploy the test pod with `helm test`.")),
    }


def _model() -> Schema:
    return block(
        "The model that is served.",
        uri=text("demo, a Hugging Face id, or a folder of `claim`."),
        name=text("Name that clients use; uri by default."),
        aliases=many("Other names for it.", {"type": "string"}),
        tokenizer=text("Tokenizer folder or id; the model's own by default."),
        revision=text("Branch, tag or commit of a Hugging Face model."),
        sizeGiB=number("Size of the weights. The time that a pod may take to start follows."),
        loadMiBPerSecond=number("Slowest rate at which weights are fetched and read."),
        claim=text("PersistentVolumeClaim with model folders, mounted read-only."),
        mountPath=text("Where `claim` is mounted."),
    )


def _placement() -> dict[str, Schema]:
    return {
        "podAnnotations": labels("Annotations of the pods."),
        "podLabels": labels("Labels of the pods."),
        "nodeSelector": labels(K8S),
        "tolerations": many(K8S, free("A toleration.")),
        "affinity": free(K8S),
        "topologySpread": many(
            "Spread constraints without labelSelector, in place of an even spread over nodes.",
            free("A constraint."),
        ),
        "priorityClassName": text(K8S),
        "runtimeClassName": text(K8S),
        "pdb": block(
            "Disruption budget, made where there may be more than one pod.",
            enabled=flag("Make one."),
            maxUnavailable=whole("Pods that may be away at once.", 1),
        ),
    }


def _resources() -> Schema:
    quantity: Schema = {
        "anyOf": [{"type": "string", "pattern": QUANTITY_PATTERN}, {"type": "number"}]
    }
    kinds = {part: free("By resource.", quantity) for part in ("requests", "limits")}
    return block("CPU, memory and other resources of a pod.", **kinds)


def _worker_settings() -> dict[str, Schema]:
    return {
        "accelerator": text("What computes.", "cpu", "nvidia"),
        "tensorParallel": whole("GPUs that share the model, one process each.", 1),
        "hosts": whole(
            "Pods of a replica, with as many of these processes in each. Several make a "
            "LeaderWorkerSet, whose API the cluster must have.", 1,
        ),
        "options": options(
            "Options of `quire worker`, as in docs/cli.md.",
            EngineConfig, LogConfig, except_for=(*FOLLOWS_ELSEWHERE, "log_format"),
        ),
        "transfer": options(
            "Options of KV transfer, as in docs/cli.md.", TransferConfig, except_for=PLACES
        ),
        "env": many("Environment variables of the container.", free(K8S)),
        "drainSeconds": whole("Time for requests in progress when a pod ends.", 1),
        "workload": text(
            "What makes the pods. A Deployment takes the idlest first when it scales down, by what "
            "routers tell Kubernetes; its pods have no names, so it needs discovery kubernetes.",
            "StatefulSet", "Deployment",
        ),
        "resources": _resources(),
        "rdma": block(
            "Network cards that write into memory, for kv_transports [nixl, ...].",
            enabled=flag("Ask for the device and allow locked memory."),
            resource=text("Name of the device plugin's resource."),
            count=whole("Devices per pod.", 1),
        ),
    } | _placement()  # fmt: skip


def _workers() -> dict[str, Schema]:
    autoscaling = block(
        "Pods by load, between two numbers. In place of replicas.",
        enabled=flag("Make the object."),
        kind=text("hpa (needs a custom metrics adapter) or keda.", "hpa", "keda"),
        minReplicas=whole("Fewest pods.", 1),
        maxReplicas=whole("Most pods.", 1),
        waitingPerPod=number("Waiting requests per pod that are aimed at."),
        kvCacheUsage=number("Share of KV blocks in use that is aimed at."),
        prometheusUrl=text("Where KEDA asks Prometheus."),
    )
    replicas = whole("Pods; null for 1 where the role is needed.", optional=True)
    role = {"replicas": replicas, "autoscaling": autoscaling} | _worker_settings()
    return {
        "engine": block("Settings of all worker pods.", **_worker_settings()),
        "roles": block(
            "Worker pods by role. Each may override anything of `engine`.",
            unified=block("Pods that answer requests alone.", **role),
            prefill=block("Pods that compute prompts and push their KV blocks.", **role),
            decode=block("Pods that answer with prompts from prefill pods.", **role),
        ),
    }


def _router() -> Schema:
    return block(
        "Routers choose a pod by cached prefix, load and transfer cost.",
        enabled=flag("Deploy routers."),
        replicas=whole("Routers; each follows all workers.", 1),
        readinessGate=flag(
            "Worker pods become ready only once a router has them, so that an update which routers "
            "cannot follow stops at its first pod. Needs discovery kubernetes."
        ),
        options=options(
            "Options of `quire router`, as in docs/cli.md.",
            RouterConfig, LogConfig, except_for=("log_format",),
        ),
        env=many("Environment variables of the container.", free(K8S)),
        resources=_resources(),
        **_placement(),
    )  # fmt: skip


def _gateway() -> Schema:
    return block(
        "Gateways: the HTTP API.",
        replicas=whole("Gateways.", 1),
        options=options(
            "Options of `quire gateway`, as in docs/cli.md.",
            GatewayConfig, RouterConfig, LogConfig, except_for=(*GATEWAY_OWN, "log_format"),
        ),
        env=many("Environment variables of the container.", free(K8S)),
        drainSeconds=whole("Time for requests in progress when a pod ends.", 1),
        resources=_resources(),
        **_placement(),
        autoscaling=block(
            "Gateways by CPU use, in place of replicas.",
            enabled=flag("Make a HorizontalPodAutoscaler."),
            minReplicas=whole("Fewest.", 1),
            maxReplicas=whole("Most.", 1),
            cpuUtilization=whole("Percent of the requested CPU that is aimed at.", 1),
        ),
        auth=block(
            "API keys.",
            enabled=flag("Require a key."),
            existingSecret=text("Secret with key api-key; one is generated otherwise."),
        ),
        service=block(
            "The gateway's Service.",
            type=text("Its type.", "ClusterIP", "NodePort", "LoadBalancer"),
            port=whole("Its port.", 1),
            annotations=labels("Its annotations."),
        ),
        **_routes(),
    )  # fmt: skip


def _routes() -> dict[str, Schema]:
    return {
        "ingress": block(
            "Ingress to the gateway.",
            enabled=flag("Make one."),
            className=text("Ingress class."),
            annotations=labels("Its annotations."),
            host=text("Host name; every host by default."),
            path=text("Path prefix, passed on as it is."),
            tlsSecret=text("Secret with the certificate for HTTPS."),
        ),
        "httpRoute": block(
            "HTTPRoute of the Gateway API.",
            enabled=flag("Make one."),
            parentRefs=many("Gateways it belongs to.", free("A reference.")),
            hostnames=many("Host names.", {"type": "string"}),
            path=text("Path prefix, removed on the way to the gateway."),
            annotations=labels("Its annotations."),
        ),
        "inferencePool": block(
            "InferencePool over the gateways, for an endpoint picker in front of them.",
            enabled=flag("Make one, and let httpRoute point to it."),
            endpointPicker=text("Service of the endpoint picker."),
            endpointPickerPort=whole("Its port.", 1),
        ),
    }


def _ray() -> Schema:
    container: dict[str, Schema] = {
        "env": many("Environment variables of the container.", free(K8S)),
        "resources": _resources(),
    }
    return block(
        "Worker pods as nodes of a Ray cluster, with a coordinator.",
        enabled=flag("Deploy the cluster's head with the coordinator; worker pods join it."),
        kuberay=block(
            "The KubeRay operator.",
            enabled=flag("Have it make the pods, in place of StatefulSets."),
            kind=text(
                "What it makes them from. With a RayService each change makes a second cluster, "
                "beside the first until its pods are ready.",
                "RayCluster", "RayService",
            ),
        ),
        token=block(
            "Secret that every process of Ray knows.",
            existingSecret=text("Secret with key auth_token; one is generated otherwise."),
        ),
        persistence=block(
            "Volume of the coordinator's state and, without redis, of Ray's.",
            existingClaim=text("Claim to use; one is made otherwise."),
            storageClass=text("Storage class; the cluster's default by default."),
            size=text("Size."),
        ),
        redis=block(
            "Ray's state in Redis.",
            address=text("host:port of Redis; RocksDB on the volume if empty."),
            existingSecret=text("Secret with key redis-password."),
        ),
        head=block("Ray's head.", **container),
        coordinator=block(
            "The coordinator, beside the head.",
            options=options(
                "Options of a fleet file's coordinator, as in docs/coordinator.md.",
                CoordinatorConfig, except_for=COORDINATOR_OWN,
            ),
            **container,
        ),
        **_placement(),
    )  # fmt: skip


def _cluster() -> dict[str, Schema]:
    return {
        "discovery": text("How gateways and routers find workers.", "static", "kubernetes"),
        "cluster": block(
            "What pods know each other by.",
            token=block(
                "Secret that every pod knows.",
                existingSecret=text("Secret with key cluster-token; generated otherwise."),
            ),
            tls=block(
                "Mutual TLS between pods.",
                enabled=flag("Use it."),
                existingSecret=text("Secret with tls.crt, tls.key, ca.crt; generated otherwise."),
                validityDays=whole("Life of generated certificates.", 1),
            ),
        ),
        "cache": block(
            "Downloaded weights.",
            persistence=block(
                "A volume shared by the worker pods.",
                enabled=flag("Use one; an emptyDir per pod otherwise."),
                existingClaim=text("Claim to use; one is made otherwise, and kept at uninstall."),
                storageClass=text("Storage class; the cluster's default by default."),
                accessModes=many("Access modes.", {"type": "string"}),
                size=text("Size."),
            ),
            sizeLimit=text("Limit of the emptyDir."),
        ),
        "secrets": block(
            "Secrets of others.",
            hfToken=block(
                "Hugging Face token.",
                existingSecret=text("Secret that holds it."),
                key=text("Its key in the Secret."),
            ),
        ),
    }


def _monitoring() -> Schema:
    return block(
        "Objects of the Prometheus operator and of Grafana's sidecar.",
        podMonitor=block(
            "How Prometheus finds the pods.",
            enabled=flag("Make PodMonitors."),
            interval=text("Time between scrapes."),
            labels=labels("Labels that Prometheus selects by."),
        ),
        serviceMonitor=block(
            "ServiceMonitor for the gateway, in place of its PodMonitor.", enabled=flag("Make one.")
        ),
        rules=block(
            "Alerts.",
            enabled=flag("Make a PrometheusRule."),
            labels=labels("Labels that Prometheus selects by."),
            runbookUrl=text("URL of docs/runbooks.md, for the alerts' links."),
        ),
        dashboards=block(
            "Dashboards.",
            enabled=flag("Make a ConfigMap for each."),
            labels=labels("Labels that the sidecar selects by."),
            annotations=labels("Further annotations."),
            folder=text("Folder in Grafana."),
        ),
    )


def _safety() -> dict[str, Schema]:
    return {
        "networkPolicy": block(
            "Who may connect to what: to gateways everybody, to other pods only those that must.",
            enabled=flag("Make NetworkPolicies."),
            gatewayFrom=many("Peers that may call gateways; everybody if empty.", free("A peer.")),
            metricsFrom=many("Peers that may scrape workers and routers.", free("A peer.")),
            kuberayFrom=many(
                "Peers that may reach the dashboard of a RayService's head: KubeRay's operator.",
                free("A peer."),
            ),
        ),
        "serviceAccount": block(
            "Account of all pods; its token is not mounted.",
            create=flag("Make one."),
            name=text("Its name."),
            annotations=labels("Its annotations."),
        ),
        "podSecurityContext": free(K8S),
        "securityContext": free("As in a container's specification."),
    }
