{{- /* GPUs, or processes on CPUs, of one pod. */ -}}
{{- define "quire.ranksPerPod" -}}
{{- div .tensorParallel .hosts -}}
{{- end -}}

{{- /* Whether a replica may be several pods; call with (dict "root" $ "role" r "settings" s). */ -}}
{{- define "quire.checkGroup" -}}
{{- $key := printf "roles.%s.hosts" .role -}}
{{- $hosts := .settings.hosts | int -}}
{{- if mod .settings.tensorParallel $hosts -}}
{{- fail (printf "%s: tensorParallel %d cannot be split evenly over %d pods" $key (int .settings.tensorParallel) $hosts) -}}
{{- end -}}
{{- if ne .settings.workload "StatefulSet" -}}
{{- fail (printf "%s: pods of a Deployment are no group; leave workload StatefulSet, which a LeaderWorkerSet takes the place of" $key) -}}
{{- end -}}
{{- if .root.Values.ray.enabled -}}
{{- fail (printf "%s: with ray.enabled pods are nodes, each for a whole replica; a LeaderWorkerSet needs no Ray" $key) -}}
{{- end -}}
{{- $api := "leaderworkerset.x-k8s.io/v1" -}}
{{- if not (.root.Capabilities.APIVersions.Has $api) -}}
{{- fail (printf "%s: a replica of %d pods is a LeaderWorkerSet, and the cluster does not know %s. Install it (https://lws.sigs.k8s.io), or, where helm does not ask the cluster, give --api-versions=%s" $key $hosts $api $api) -}}
{{- end -}}
{{- end -}}

{{- /* Replicas of several pods: rank 0 and the first others in the leader, the rest in pods behind it. */ -}}
{{- define "quire.group" -}}
{{- $pool := .settings -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {{ include "quire.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "quire.labels" . | nindent 4 }}
spec:
  {{- if not $pool.scaled }}
  replicas: {{ $pool.replicas }}
  {{- end }}
  # the leader is ready when all are
  startupPolicy: LeaderCreated
  # of the Service with the set's own name, which is there before it
  networkConfig: {subdomainPolicy: Shared}
  rolloutStrategy:
    type: RollingUpdate
    # no spare accelerators are needed to replace a group
    rollingUpdateConfiguration: {maxUnavailable: 1, maxSurge: 0}
  leaderWorkerTemplate:
    size: {{ $pool.hosts }}
    # ranks live and die together
    restartPolicy: RecreateGroupOnPodRestart
    leaderTemplate:
      {{- include "quire.workerPod" . | nindent 6 }}
    workerTemplate:
      {{- include "quire.workerPod" (merge (dict "follows" true) .) | nindent 6 }}
{{- end -}}
