{{- define "quire.routerConfig" -}}
listen: 0.0.0.0:9100
http_port: 9090
log_format: json
{{ include "quire.upstream" (dict "root" . "key" "pod") }}
{{- if include "quire.tellsCosts" . }}
deletion_cost: true
{{- end }}
{{- if include "quire.tellsReadiness" . }}
readiness_gate: true
{{- end }}
{{ include "quire.tlsOptions" . }}
{{- with .Values.router.options }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "quire.gatewayConfig" -}}
served_model_name:
  - {{ include "quire.modelName" . | quote }}
  {{- range .Values.model.aliases }}
  - {{ . | quote }}
  {{- end }}
{{- with .Values.model.tokenizer }}
tokenizer: {{ . | quote }}
{{- end }}
{{- with .Values.model.revision }}
revision: {{ . | quote }}
{{- end }}
host: 0.0.0.0
port: 8000
log_format: json
allow_unauthenticated: {{ not .Values.gateway.auth.enabled }}
shutdown_timeout: {{ .Values.gateway.drainSeconds }}
{{ include "quire.upstream" (dict "root" . "key" "worker") }}
{{- if .Values.router.enabled }}
router:
  {{- range include "quire.routers" . | trim | splitList "\n" }}
  - {{ . | quote }}
  {{- end }}
{{- end }}
{{ include "quire.tlsOptions" . }}
{{- with .Values.gateway.options }}
{{ toYaml . }}
{{- end }}
{{- end -}}
