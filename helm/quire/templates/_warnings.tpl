{{- /* What the values ask for and may regret, one line each. */ -}}
{{- define "quire.warnings" -}}
{{- $pools := include "quire.pools" . | fromYaml -}}
{{- $gateway := .Values.gateway -}}
{{- $exposed := or $gateway.ingress.enabled $gateway.httpRoute.enabled (ne $gateway.service.type "ClusterIP") -}}
{{- if not $gateway.auth.enabled }}
gateway.auth.enabled is false: anyone who reaches the gateway may use it{{ if $exposed }}, and it is exposed outside the cluster{{ end }}.
{{- end }}
{{- if not .Values.networkPolicy.enabled }}
networkPolicy.enabled is false: every pod of the cluster may connect to workers and routers.
{{- end }}
{{- if not .Values.cluster.tls.enabled }}
cluster.tls.enabled is false: pods prove that they know the cluster's token, but prompts and KV blocks travel between them unencrypted.
{{- else if not .Values.cluster.tls.existingSecret }}
The certificates of cluster.tls are generated and end after {{ .Values.cluster.tls.validityDays }} days; tools that only render the chart make new ones each time: give cluster.tls.existingSecret there.
{{- end }}
{{- if and .Values.ray.enabled .Values.cluster.tls.enabled }}
ray.enabled: cluster.tls encrypts what pods say to each other, but not what Ray's own processes do, which prove that they know Ray's token.
{{- end }}
{{- if and .Values.ray.enabled (not .Values.ray.redis.address) }}
ray.enabled: Ray keeps its state by RocksDB, which it calls alpha{{ if eq (include "quire.kuberay" .) "RayService" }}, and in a RayService only for as long as the head's pod lives{{ end }}; ray.redis.address keeps it in Redis.
{{- end }}
{{- if and $gateway.ingress.enabled (not $gateway.ingress.tlsSecret) }}
gateway.ingress has no tlsSecret: API keys travel unencrypted unless something in front of it ends TLS.
{{- end }}
{{- if and (ne .Values.model.uri "demo") (not .Values.cache.persistence.enabled) (not .Values.model.claim) }}
cache.persistence.enabled is false: every new pod downloads {{ .Values.model.uri }} again.
{{- end }}
{{- if and (lt (int $gateway.replicas) 2) (not ($gateway.autoscaling | default dict).enabled) }}
gateway.replicas is 1: a node that goes away takes the endpoint with it until the pod is back.
{{- end }}
{{- if and (hasKey $pools "prefill") (not .Values.router.enabled) }}
router.enabled is false: prompts are placed by role alone, not by cached prefix and load.
{{- end }}
{{- if .Values.monitoring.podMonitor.enabled }}{{ else if or .Values.monitoring.rules.enabled .Values.monitoring.dashboards.enabled }}
monitoring.podMonitor.enabled is false: dashboards and alerts stay empty unless Prometheus finds the pods by other means.
{{- end }}
{{- end -}}
