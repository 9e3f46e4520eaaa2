{{- /* What KubeRay makes the pods from: nothing, RayCluster or RayService. */ -}}
{{- define "quire.kuberay" -}}
{{- if .Values.ray.kuberay.enabled }}{{ .Values.ray.kuberay.kind }}{{ end -}}
{{- end -}}

{{- /*
Host of the coordinator. KubeRay makes a Service for the head's pod; that of a RayService leads to the
cluster that serves, and to another one once that has taken over.
*/ -}}
{{- define "quire.coordinatorHost" -}}
{{- if include "quire.kuberay" . -}}
{{- printf "%s-head-svc.%s.svc" (include "quire.fullname" .) .Release.Namespace -}}
{{- else -}}
{{- include "quire.domain" (dict "root" . "component" "coordinator") -}}
{{- end -}}
{{- end -}}

{{- define "quire.kuberayMetadata" -}}
name: {{ include "quire.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "quire.labels" (dict "root" . "component" "") | nindent 2 }}
annotations:
  # quire node starts Ray, and drains engines at a pod's end
  ray.io/overwrite-container-cmd: "true"
{{- end -}}

{{- /* Specification of a RayCluster. */ -}}
{{- define "quire.rayCluster" -}}
{{- $root := . -}}
{{- $redis := .Values.ray.redis -}}
rayVersion: "2.60.0"
{{- if $redis.address }}
gcsFaultToleranceOptions:
  redisAddress: {{ $redis.address | quote }}
  {{- with $redis.existingSecret }}
  redisPassword:
    valueFrom: {secretKeyRef: {name: {{ . }}, key: redis-password}}
  {{- end }}
{{- end }}
headGroupSpec:
  rayStartParams: {num-cpus: "0"}
  template:
    {{- include "quire.coordinatorPod" . | nindent 4 }}
workerGroupSpecs:
  {{- range $role, $pool := include "quire.pools" . | fromYaml }}
  - groupName: {{ $role }}
    replicas: {{ $pool.replicas }}
    minReplicas: {{ $pool.replicas }}
    maxReplicas: {{ $pool.replicas }}
    rayStartParams: {num-cpus: {{ include "quire.cpus" $pool | quote }}}
    template:
      {{- include "quire.workerPod" (dict "root" $root "component" $role "settings" $pool) | nindent 6 }}
  {{- end }}
{{- end -}}
