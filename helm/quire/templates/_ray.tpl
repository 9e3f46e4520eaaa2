{{- /* What Ray needs of every container that is a part of it. */ -}}
{{- define "quire.rayEnv" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "quire.rayTokenSecret" . }}
      key: auth_token
{{- end -}}

{{- /* CPUs of a pod as a whole number, as the kubelet counts them for resourceFieldRef. */ -}}
{{- define "quire.cpus" -}}
{{- $cpu := .resources.limits.cpu | toString -}}
{{- if hasSuffix "m" $cpu -}}
{{- divf (trimSuffix "m" $cpu | float64) 1000.0 | ceil -}}
{{- else -}}
{{- $cpu | float64 | ceil -}}
{{- end -}}
{{- end -}}

{{- /* Options of a worker pod that is a node of Ray. */ -}}
{{- define "quire.nodeConfig" -}}
cpus: {{ include "quire.cpus" .settings }}
gpus: {{ ternary .settings.tensorParallel 0 (eq .settings.accelerator "nvidia") }}
node_label: ["quire.pool={{ .component }}"]
{{- if not (include "quire.kuberay" .root) }}
join: {{ include "quire.coordinatorHost" .root }}:6379
{{- end }}
log_format: json
{{- end -}}

{{- define "quire.fleet" -}}
{{- $root := . -}}
fleet: {{ include "quire.fullname" . }}
ray: auto
listen: 0.0.0.0:9200
http_port: 9090
state_dir: /state/coordinator
{{- /* a pod bounds its engine's life: nothing is left over when Ray is away for long */}}
{{ toYaml (merge (deepCopy .Values.ray.coordinator.options) (dict "orphan_s" 86400 "ray_wait_s" 1800)) }}
log:
  {{- toYaml (merge (pick .Values.engine.options "log_level" "log_format") (dict "log_format" "json")) | nindent 2 }}
models:
  - name: {{ include "quire.modelName" . | quote }}
    engine:
      model: {{ .Values.model.uri | quote }}
      {{- with .Values.model.tokenizer }}
      tokenizer: {{ . | quote }}
      {{- end }}
      {{- with .Values.model.revision }}
      revision: {{ . | quote }}
      {{- end }}
    pools:
      {{- range $role, $pool := include "quire.pools" . | fromYaml }}
      {{- $own := get $root.Values.roles $role }}
      {{- if or (get $own "transfer") (pick ($own.options | default dict) "log_level" "log_format") }}
      {{- fail (printf "roles.%s: with ray.enabled transfer and log options are those of engine for all roles" $role) }}
      {{- end }}
      - name: {{ $role }}
        role: {{ ternary "both" $role (eq $role "unified") }}
        replicas: {{ $pool.replicas }}
        cpus: {{ include "quire.cpus" $pool }}
        gpus: {{ ternary $pool.tensorParallel 0 (eq $pool.accelerator "nvidia") }}
        node_label: quire.pool={{ $role }}
        port: 9000
        http_port: 9090
        engine:
          device: {{ ternary "cuda" "cpu" (eq $pool.accelerator "nvidia") }}
          tensor_parallel_size: {{ $pool.tensorParallel }}
          drain_timeout_s: {{ $pool.drainSeconds }}
          {{- if eq $pool.accelerator "cpu" }}
          num_threads: {{ include "quire.cpus" $pool }}
          {{- end }}
          {{- with omit $pool.options "log_level" "log_format" }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
      {{- end }}
transfer:
  kv_tcp_port: 9200
  kv_grpc_port: 9300
  {{- with .Values.engine.transfer }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "quire.stateClaim" -}}
{{- default (printf "%s-coordinator" (include "quire.fullname" .)) .Values.ray.persistence.existingClaim -}}
{{- end -}}

{{- /* Mounts of both containers: Ray's drivers find its sockets below /tmp. */ -}}
{{- define "quire.coordinatorMounts" -}}
- name: config
  mountPath: /etc/quire
  readOnly: true
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
- name: state
  mountPath: /state
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

{{- /* Metadata and specification of the pod with Ray's head and the coordinator. */ -}}
{{- define "quire.coordinatorPod" -}}
{{- $ray := .Values.ray -}}
{{- $scope := dict "root" . "component" "coordinator" "settings" $ray -}}
{{- $kuberay := include "quire.kuberay" . -}}
{{- $service := eq $kuberay "RayService" -}}
metadata:
  labels:
    {{- include "quire.podLabels" $scope | nindent 4 }}
  annotations:
    checksum/config: {{ include "quire.fleet" . | sha256sum }}
    {{- with $ray.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "quire.podSettings" $scope | nindent 2 }}
  # engines run on without it
  terminationGracePeriodSeconds: 30
  containers:
    - name: ray
      image: {{ include "quire.image" (dict "root" . "flavour" "coordinator") }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args:
        - node
        - --address=$(POD_IP)
        {{- if $service }}
        - --dashboard
        - --node-label=quire.pool=coordinator
        {{- end }}
        - --log-format=json
      env:
        {{- include "quire.rayEnv" . | nindent 8 }}
        {{- if $service }}
        # for the application that says whether the fleet serves
        - name: QUIRE_COORDINATOR
          value: $(POD_IP):9200
        {{- include "quire.tokenEnv" . | nindent 8 }}
        {{- end }}
        {{- if $ray.redis.address }}
        {{- /* KubeRay gives each cluster a part of Redis, and the address */}}
        {{- if not $kuberay }}
        - name: RAY_REDIS_ADDRESS
          value: {{ $ray.redis.address | quote }}
        {{- end }}
        {{- with $ray.redis.existingSecret }}
        - name: RAY_REDIS_PASSWORD
          valueFrom: {secretKeyRef: {name: {{ . }}, key: redis-password}}
        {{- end }}
        {{- else }}
        - name: RAY_gcs_storage
          value: rocksdb
        - name: RAY_gcs_storage_path
          value: /state/gcs
        {{- end }}
        - name: HOME
          value: /tmp
        {{- with $ray.head.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: gcs, containerPort: 6379}
        {{- if $kuberay }}
        # of the coordinator: KubeRay's Service has the ports of the first container
        - {name: grpc, containerPort: 9200}
        {{- end }}
        {{- if $service }}
        - {name: dashboard, containerPort: 8265}
        # KubeRay makes no Service without this name; nothing listens there
        - {name: serve, containerPort: 8000}
        {{- end }}
      startupProbe:
        tcpSocket: {port: gcs}
        periodSeconds: 2
        failureThreshold: 60
      livenessProbe:
        tcpSocket: {port: gcs}
        periodSeconds: 10
        failureThreshold: 6
      readinessProbe:
        tcpSocket: {port: gcs}
        periodSeconds: 3
        failureThreshold: 2
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      resources:
        {{- toYaml $ray.head.resources | nindent 8 }}
      volumeMounts:
        {{- include "quire.coordinatorMounts" . | nindent 8 }}
    - name: coordinator
      image: {{ include "quire.image" (dict "root" . "flavour" "coordinator") }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args:
        - up
        - --fleet-file=/etc/quire/fleet.yaml
        {{- if $service }}
        # a fleet of its own, also while another cluster has one by the same file
        - --fleet-name=$(RAY_CLUSTER_NAME)
        {{- end }}
        - --log-format=json
      env:
        {{- include "quire.rayEnv" . | nindent 8 }}
        # the head beside it, not what Ray finds by looking around
        - name: RAY_ADDRESS
          value: $(POD_IP):6379
        {{- include "quire.tokenEnv" . | nindent 8 }}
        {{- if $service }}
        - name: RAY_CLUSTER_NAME
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['ray.io/cluster']"}}
        {{- end }}
        {{- range $option, $path := include "quire.tlsOptions" . | fromYaml }}
        - name: QUIRE_{{ upper $option }}
          value: {{ $path }}
        {{- end }}
        {{- include "quire.env" . | nindent 8 }}
        {{- with $ray.coordinator.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- if not $kuberay }}
        - {name: grpc, containerPort: 9200}
        {{- end }}
        - {name: status, containerPort: 9090}
      startupProbe:
        httpGet: {path: /healthz, port: status}
        periodSeconds: 2
        timeoutSeconds: 3
        failureThreshold: 60
      livenessProbe:
        httpGet: {path: /healthz, port: status}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      readinessProbe:
        httpGet: {path: /readyz, port: status}
        periodSeconds: 3
        timeoutSeconds: 3
        failureThreshold: 2
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      resources:
        {{- toYaml $ray.coordinator.resources | nindent 8 }}
      volumeMounts:
        {{- include "quire.coordinatorMounts" . | nindent 8 }}
  volumes:
    - name: config
      configMap:
        name: {{ include "quire.fullname" . }}-coordinator
    - name: tmp
      emptyDir:
        sizeLimit: 2Gi
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: 256Mi}
    - name: state
      {{- if $service }}
      # of this cluster alone
      emptyDir: {sizeLimit: {{ $ray.persistence.size }}}
      {{- else }}
      persistentVolumeClaim:
        claimName: {{ include "quire.stateClaim" . }}
      {{- end }}
    {{- if .Values.cluster.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "quire.tlsSecret" . }}
        defaultMode: 0440
    {{- end }}
    {{- with .Values.model.claim }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ . }}
        readOnly: true
    {{- end }}
{{- end -}}
