{{- define "quire.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* 40 characters: "-unified-0" and a hash must fit behind it */ -}}
{{- define "quire.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "quire.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "quire.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Labels of an object; call with (dict "root" $ "component" "gateway"). */ -}}
{{- define "quire.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: quire
{{ include "quire.selector" . }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "quire.selector" -}}
app.kubernetes.io/name: {{ include "quire.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- /* Labels of a pod: nothing that changes with the chart, or an upgrade would load every model anew. */ -}}
{{- define "quire.podLabels" -}}
app.kubernetes.io/part-of: quire
{{ include "quire.selector" . }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with (.settings | default dict).podLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "quire.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "quire.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* "true" where routers tell Kubernetes which pods to delete first. */ -}}
{{- define "quire.tellsCosts" -}}
{{- if .Values.router.enabled -}}
{{- range $role, $pool := include "quire.pools" . | fromYaml -}}
{{- if eq $pool.workload "Deployment" }}true{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* "true" where routers tell Kubernetes which pods they have. */ -}}
{{- define "quire.tellsReadiness" -}}
{{- if .Values.router.readinessGate -}}
{{- if or (ne .Values.discovery "kubernetes") (not .Values.router.enabled) -}}
{{- fail "router.readinessGate: routers tell Kubernetes of the pods that they find: it needs discovery kubernetes and router.enabled" -}}
{{- end -}}
true
{{- end -}}
{{- end -}}

{{- /* Who may patch pods is nobody but routers. */ -}}
{{- define "quire.routerAccount" -}}
{{- include "quire.serviceAccount" . -}}
{{- $tells := or (include "quire.tellsCosts" .) (include "quire.tellsReadiness" .) -}}
{{- if and .Values.serviceAccount.create $tells }}-router{{ end -}}
{{- end -}}

{{- /* Image of a flavour; call with (dict "root" $ "flavour" "gateway"). */ -}}
{{- define "quire.image" -}}
{{- $image := .root.Values.image -}}
{{- $name := $image.repository -}}
{{- with $image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- $digest := get $image.digests .flavour -}}
{{- if $digest -}}
{{- printf "%s@%s" $name $digest -}}
{{- else -}}
{{- $with := "" -}}
{{- if and .root.Values.ray.enabled (has .flavour (list "cpu" "nvidia")) }}{{ $with = "-ray" }}{{ end -}}
{{- if and (eq .flavour "coordinator") (eq (include "quire.kuberay" .root) "RayService") }}{{ $with = "-serve" }}{{ end -}}
{{- printf "%s:%s-%s%s" $name (default .root.Chart.AppVersion $image.tag) (get $image.flavours .flavour) $with -}}
{{- end -}}
{{- end -}}

{{- define "quire.modelName" -}}
{{- default .Values.model.uri .Values.model.name -}}
{{- end -}}

{{- define "quire.apiKeySecret" -}}
{{- default (printf "%s-api-key" (include "quire.fullname" .)) .Values.gateway.auth.existingSecret -}}
{{- end -}}

{{- define "quire.tokenSecret" -}}
{{- default (printf "%s-cluster-token" (include "quire.fullname" .)) .Values.cluster.token.existingSecret -}}
{{- end -}}

{{- define "quire.tlsSecret" -}}
{{- default (printf "%s-cluster-tls" (include "quire.fullname" .)) .Values.cluster.tls.existingSecret -}}
{{- end -}}

{{- define "quire.rayTokenSecret" -}}
{{- default (printf "%s-ray-token" (include "quire.fullname" .)) .Values.ray.token.existingSecret -}}
{{- end -}}

{{- define "quire.cacheClaim" -}}
{{- default (printf "%s-cache" (include "quire.fullname" .)) .Values.cache.persistence.existingClaim -}}
{{- end -}}

{{- /* Name of a headless service, long enough that a certificate's wildcard may stand before it. */ -}}
{{- define "quire.domain" -}}
{{- printf "%s-%s.%s.svc" (include "quire.fullname" .root) .component .root.Release.Namespace -}}
{{- end -}}

{{- /*
The worker pools that exist, as a map from role to its settings: the role's own over those of
engine, with replicas and the highest number of them worked out.
*/ -}}
{{- define "quire.pools" -}}
{{- $given := .Values.roles -}}
{{- $wanted := dict -}}
{{- range $role, $settings := $given -}}
{{- if and $settings.autoscaling $settings.autoscaling.enabled -}}
{{- $_ := set $wanted $role ($settings.autoscaling.minReplicas | default 1 | int) -}}
{{- else if not (kindIs "invalid" $settings.replicas) -}}
{{- $_ := set $wanted $role ($settings.replicas | int) -}}
{{- end -}}
{{- end -}}
{{- $prefill := get $wanted "prefill" | default 0 | int -}}
{{- if and $prefill (not (hasKey $wanted "decode")) -}}{{- $_ := set $wanted "decode" 1 -}}{{- end -}}
{{- $decode := get $wanted "decode" | default 0 | int -}}
{{- if and (not (hasKey $wanted "unified")) (eq (add $prefill $decode) 0) -}}{{- $_ := set $wanted "unified" 1 -}}{{- end -}}
{{- $unified := get $wanted "unified" | default 0 | int -}}
{{- if eq (add $prefill $decode $unified) 0 -}}
{{- fail "roles: there is no pod to serve the model; give unified or decode a replica" -}}
{{- end -}}
{{- if and $prefill (eq (add $decode $unified) 0) -}}
{{- fail "roles: prefill pods alone answer nothing; give roles.decode.replicas" -}}
{{- end -}}
{{- $pools := dict -}}
{{- range $role, $replicas := $wanted -}}
{{- if gt ($replicas | int) 0 -}}
{{- $settings := merge (deepCopy (get $given $role)) (deepCopy $.Values.engine) -}}
{{- $most := $replicas -}}
{{- $scaled := and $settings.autoscaling $settings.autoscaling.enabled -}}
{{- if $scaled -}}{{- $most = $settings.autoscaling.maxReplicas | int -}}{{- end -}}
{{- if lt ($most | int) ($replicas | int) -}}
{{- fail (printf "roles.%s.autoscaling: maxReplicas %d is less than minReplicas %d" $role ($most | int) ($replicas | int)) -}}
{{- end -}}
{{- if and $.Values.ray.enabled $scaled -}}
{{- fail (printf "roles.%s.autoscaling: with ray.enabled the coordinator keeps one engine in each of a fixed number of pods: give roles.%s.replicas" $role $role) -}}
{{- end -}}
{{- if eq $settings.workload "Deployment" -}}
{{- if or (ne $.Values.discovery "kubernetes") $.Values.cluster.tls.enabled $.Values.ray.enabled -}}
{{- fail (printf "roles.%s.workload: pods of a Deployment have no names: it needs discovery kubernetes, and goes without cluster.tls and ray" $role) -}}
{{- end -}}
{{- end -}}
{{- if gt ($settings.hosts | int) 1 -}}
{{- include "quire.checkGroup" (dict "root" $ "role" $role "settings" $settings) -}}
{{- $_ := set $settings "workload" "LeaderWorkerSet" -}}
{{- end -}}
{{- $_ := set $settings "replicas" ($replicas | int) -}}
{{- $_ := set $settings "most" ($most | int) -}}
{{- $_ := set $settings "scaled" (ternary true false (eq $scaled true)) -}}
{{- $_ := set $pools $role $settings -}}
{{- end -}}
{{- end -}}
{{- toYaml $pools -}}
{{- end -}}

{{- /* Addresses of all workers there may be, one per line: the names of StatefulSet pods are known. */ -}}
{{- define "quire.workers" -}}
{{- $root := . -}}
{{- range $role, $pool := include "quire.pools" . | fromYaml -}}
{{- range $number := until ($pool.most | int) }}
{{ printf "%s-%s-%d=%s-%s-%d.%s:9000" (include "quire.fullname" $root) $role $number (include "quire.fullname" $root) $role $number (include "quire.domain" (dict "root" $root "component" $role)) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Where workers are: names, or the Services that they are behind. Call with root and key. */ -}}
{{- define "quire.upstream" -}}
{{- if .root.Values.ray.enabled -}}
coordinator: {{ include "quire.coordinatorHost" .root }}:9200
{{- else if eq .root.Values.discovery "kubernetes" -}}
kubernetes_service:
  {{- range $role, $_ := include "quire.pools" .root | fromYaml }}
  - {{ include "quire.fullname" $.root }}-{{ $role }}
  {{- end }}
{{- else -}}
{{ .key }}:
  {{- range include "quire.workers" .root | trim | splitList "\n" }}
  - {{ . | quote }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "quire.routers" -}}
{{- $root := . -}}
{{- range $number := until (.Values.router.replicas | int) }}
{{ printf "%s-router-%d.%s:9100" (include "quire.fullname" $root) $number (include "quire.domain" (dict "root" $root "component" "router")) }}
{{- end -}}
{{- end -}}

{{- /* Settings of a pod that every component has; call with (dict "root" $ "component" c "settings" s). */ -}}
{{- define "quire.podSettings" -}}
serviceAccountName: {{ include (ternary "quire.routerAccount" "quire.serviceAccount" (eq .component "router")) .root }}
automountServiceAccountToken: {{ and (eq .root.Values.discovery "kubernetes") (has .component (list "gateway" "router")) }}
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .settings.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .settings.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .settings.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- if .settings.topologySpread }}
  {{- range .settings.topologySpread }}
  - {{ toYaml . | nindent 4 | trim }}
    labelSelector:
      matchLabels:
        {{- include "quire.selector" (dict "root" $.root "component" $.component) | nindent 8 }}
  {{- end }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "quire.selector" (dict "root" .root "component" .component) | nindent 8 }}
{{- end }}
{{- end -}}

{{- /* Environment of every Quire container. Secrets come as files or variables, never as arguments. */ -}}
{{- define "quire.env" -}}
- name: HOME
  value: /tmp
- name: HF_HOME
  value: /cache/huggingface
{{- with .Values.secrets.hfToken.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.secrets.hfToken.key }}
{{- end }}
{{- end -}}

{{- define "quire.tokenEnv" -}}
- name: QUIRE_CLUSTER_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "quire.tokenSecret" . }}
      key: cluster-token
{{- end -}}

{{- define "quire.volumeMounts" -}}
- name: config
  mountPath: /etc/quire
  readOnly: true
- name: tmp
  mountPath: /tmp
- name: cache
  mountPath: /cache
{{- if .Values.cluster.tls.enabled }}
- name: tls
  mountPath: /etc/quire-tls
  readOnly: true
{{- end }}
{{- if .Values.model.claim }}
- name: models
  mountPath: {{ .Values.model.mountPath }}
  readOnly: true
{{- end }}
{{- end -}}

{{- /* Call with (dict "root" $ "component" c "persistent" bool). */ -}}
{{- define "quire.volumes" -}}
- name: config
  configMap:
    name: {{ include "quire.fullname" .root }}-{{ .component }}
- name: tmp
  emptyDir:
    sizeLimit: 2Gi
- name: cache
{{- if and .persistent .root.Values.cache.persistence.enabled }}
  persistentVolumeClaim:
    claimName: {{ include "quire.cacheClaim" .root }}
{{- else }}
  emptyDir:
    sizeLimit: {{ .root.Values.cache.sizeLimit }}
{{- end }}
{{- if .root.Values.cluster.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "quire.tlsSecret" .root }}
    defaultMode: 0440
{{- end }}
{{- with .root.Values.model.claim }}
- name: models
  persistentVolumeClaim:
    claimName: {{ . }}
    readOnly: true
{{- end }}
{{- end -}}

{{- /* Options that hold certificates, for config files. */ -}}
{{- define "quire.tlsOptions" -}}
{{- if .Values.cluster.tls.enabled -}}
cluster_tls_cert: /etc/quire-tls/tls.crt
cluster_tls_key: /etc/quire-tls/tls.key
cluster_tls_ca: /etc/quire-tls/ca.crt
{{- end -}}
{{- end -}}

{{- /*
Failures of a 5 s start-up probe: 2 minutes, the time to fetch and read the weights, and 10 minutes
for what else must be there first: Ray's head, or the other hosts of a replica.
*/ -}}
{{- define "quire.startupFailures" -}}
{{- $others := or .root.Values.ray.enabled (gt (.settings.hosts | int) 1) -}}
{{- $model := .root.Values.model -}}
{{- $seconds := add 120 (ternary 600 0 $others) (divf (mulf $model.sizeGiB 1024) $model.loadMiBPerSecond | ceil | int) -}}
{{- div (add $seconds 4) 5 -}}
{{- end -}}

{{- define "quire.pdb" -}}
{{- $pdb := .settings.pdb | default dict -}}
{{- if and (gt (int .most) 1) (ne (toString $pdb.enabled) "false") }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "quire.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "quire.labels" . | nindent 4 }}
spec:
  {{- $away := $pdb.maxUnavailable | default 1 | int }}
  {{- if and .root.Values.ray.kuberay.enabled (has .component (list "unified" "prefill" "decode")) }}
  # of pods of a custom resource Kubernetes does not know how many there should be
  minAvailable: {{ max 0 (sub (int .most) $away) }}
  {{- else }}
  maxUnavailable: {{ $away }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "quire.selector" . | nindent 6 }}
{{- end }}
{{- end -}}
