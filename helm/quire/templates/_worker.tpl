{{- define "quire.workerConfig" -}}
{{- $root := .root -}}
{{- $pool := .settings -}}
model: {{ $root.Values.model.uri | quote }}
served_model_name: {{ include "quire.modelName" $root | quote }}
{{- with $root.Values.model.tokenizer }}
tokenizer: {{ . | quote }}
{{- end }}
{{- with $root.Values.model.revision }}
revision: {{ . | quote }}
{{- end }}
tensor_parallel_size: {{ $pool.tensorParallel }}
device: {{ ternary "cuda" "cpu" (eq $pool.accelerator "nvidia") }}
role: {{ ternary "both" .component (eq .component "unified") }}
listen: 0.0.0.0:9000
drain_timeout_s: {{ $pool.drainSeconds }}
http_port: 9090
log_format: json
kv_host: 0.0.0.0
kv_tcp_port: 9200
kv_grpc_port: 9300
{{- if gt ($pool.hosts | int) 1 }}
master_port: 29501
{{- end }}
{{ include "quire.tlsOptions" $root }}
{{- with $pool.transfer }}
{{ toYaml . }}
{{- end }}
{{- with $pool.options }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "quire.workerSecurity" -}}
{{- $security := deepCopy .root.Values.securityContext -}}
{{- if .settings.rdma.enabled -}}
{{- /* memory that a network card writes into must stay where it is */ -}}
{{- $capabilities := get $security "capabilities" | default dict -}}
{{- $_ := set $capabilities "add" (concat (get $capabilities "add" | default list) (list "IPC_LOCK") | uniq) -}}
{{- $_ := set $security "capabilities" $capabilities -}}
{{- end -}}
{{- toYaml $security -}}
{{- end -}}

{{- define "quire.workerResources" -}}
{{- $resources := deepCopy .settings.resources -}}
{{- $extra := dict -}}
{{- if eq .settings.accelerator "nvidia" -}}{{- $_ := set $extra "nvidia.com/gpu" (include "quire.ranksPerPod" .settings | int) -}}{{- end -}}
{{- if .settings.rdma.enabled -}}{{- $_ := set $extra .settings.rdma.resource .settings.rdma.count -}}{{- end -}}
{{- range $part := list "requests" "limits" -}}
{{- $_ := set $resources $part (merge (get $resources $part | default dict) (deepCopy $extra)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- /*
Metadata and specification of a worker pod; call with (dict "root" $ "component" role "settings" pool),
and with "follows" true for a pod of a group that is not the leader: it runs further ranks for that.
Without Ray a pod runs one engine; with Ray it is a node, on which the coordinator has one started.
*/ -}}
{{- define "quire.workerPod" -}}
{{- $pool := .settings -}}
{{- $ray := .root.Values.ray.enabled -}}
{{- $shm := or $ray (gt (include "quire.ranksPerPod" $pool | int) 1) -}}
{{- $group := eq $pool.workload "LeaderWorkerSet" -}}
metadata:
  labels:
    {{- include "quire.podLabels" . | nindent 4 }}
  annotations:
    {{- /* the coordinator itself replaces engines whose options have changed */}}
    checksum/config: {{ include (ternary "quire.nodeConfig" "quire.workerConfig" $ray) . | sha256sum }}
    {{- with $pool.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "quire.podSettings" . | nindent 2 }}
  {{- if and (include "quire.tellsReadiness" .root) (not .follows) }}
  readinessGates: [{conditionType: quire/routed}]
  {{- end }}
  terminationGracePeriodSeconds: {{ add $pool.drainSeconds (ternary 20 15 $ray) }}
  containers:
    - name: worker
      image: {{ include "quire.image" (dict "root" .root "flavour" $pool.accelerator) }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      args:
        {{- if $ray }}
        - node
        - --config=/etc/quire/node.yaml
        - --address=$(POD_IP)
        {{- if include "quire.kuberay" .root }}
        # the head of this pod's own cluster, as KubeRay names it
        - --join=$(FQ_RAY_IP):6379
        {{- else }}
        - --node-name=$(POD_NAME).{{ include "quire.domain" . }}
        {{- end }}
        {{- else }}
        - worker
        - --config=/etc/quire/worker.yaml
        - --worker-name=$(POD_NAME)
        - --advertise={{ ternary "$(POD_IP)" (printf "$(POD_NAME).%s" (include "quire.domain" .)) (eq $pool.workload "Deployment") }}:9000
        {{- if $group }}
        - --nnodes=$(LWS_GROUP_SIZE)
        - --node-rank=$(LWS_WORKER_INDEX)
        # the leader's own name may not be in DNS yet when it starts to listen
        - --master-addr={{ ternary "$(LWS_LEADER_ADDRESS)" "$(POD_IP)" (eq .follows true) }}
        {{- end }}
        {{- end }}
      env:
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        {{- if eq $pool.accelerator "nvidia" }}
        - name: TRITON_CACHE_DIR
          value: /cache/triton
        {{- else if not $ray }}
        # the CPUs of the node are not those of the container
        - name: QUIRE_NUM_THREADS
          valueFrom: {resourceFieldRef: {containerName: worker, resource: limits.cpu}}
        {{- end }}
        {{- if $ray }}
        {{- include "quire.rayEnv" .root | nindent 8 }}
        {{- else }}
        {{- include "quire.tokenEnv" .root | nindent 8 }}
        {{- if has $pool.workload (list "Deployment" "LeaderWorkerSet") }}
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- end }}
        {{- end }}
        {{- include "quire.env" .root | nindent 8 }}
        {{- with $pool.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        # of the first rank; the others' follow
        - {name: kv-tcp, containerPort: 9200}
        - {name: kv-grpc, containerPort: 9300}
        {{- if eq .follows true }}
      # no probes: the leader hears from it every second, and ends the group when it does not
        {{- else }}
        - {name: grpc, containerPort: 9000}
        - {name: status, containerPort: 9090}
        {{- if $group }}
        - {name: ranks, containerPort: 29501}
        {{- end }}
      startupProbe:
        httpGet: {path: /readyz, port: status}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: {{ include "quire.startupFailures" . }}
      livenessProbe:
        httpGet: {path: /healthz, port: status}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet: {path: /readyz, port: status}
        periodSeconds: 3
        timeoutSeconds: 3
        failureThreshold: 2
        {{- end }}
      securityContext:
        {{- include "quire.workerSecurity" . | nindent 8 }}
      resources:
        {{- include "quire.workerResources" . | nindent 8 }}
      volumeMounts:
        {{- include "quire.volumeMounts" .root | nindent 8 }}
        {{- if $shm }}
        - name: shm
          mountPath: /dev/shm
        {{- end }}
  volumes:
    {{- include "quire.volumes" (dict "root" .root "component" .component "persistent" true) | nindent 4 }}
    {{- if $shm }}
    # ranks talk through it, and Ray maps its store there
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: 1Gi}
    {{- end }}
{{- end -}}
