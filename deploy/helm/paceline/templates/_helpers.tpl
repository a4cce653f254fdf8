{{- define "paceline.name" -}}
{{ ternary .Release.Name (printf "%s-paceline" .Release.Name) (contains "paceline" .Release.Name) | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "paceline.selector" -}}
app.kubernetes.io/name: paceline
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "paceline.labels" -}}
{{ include "paceline.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "paceline.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s-cpu" .Chart.AppVersion) -}}
{{ .Values.image.repository }}{{ ternary (printf "@%s" .Values.image.digest) (printf ":%s" $tag) (ne .Values.image.digest "") }}
{{- end }}

{{/* paceline.toml, without what the chart decides: the environment would win over it, silently. */}}
{{- define "paceline.config" -}}
{{- $owned := regexFind "(?m)^\\s*(host|port|api_keys|admin_keys|drain_seconds|log_format)\\s*=" .Values.config }}
{{- if $owned }}
{{- fail (printf "config: leave out %q: the chart sets it (apiKeys, drainSeconds, service)" (trim $owned)) }}
{{- end }}
{{- .Values.config }}
{{- end }}

{{- define "paceline.keySecret" -}}
{{ .Values.apiKeys.existingSecret | default (ternary (printf "%s-keys" (include "paceline.name" .)) "" (gt (len .Values.apiKeys.keys) 0)) }}
{{- end }}

{{- define "paceline.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "paceline.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{/* Where pods run, and as whom; of servers and trainers alike. */}}
{{- define "paceline.placement" -}}
automountServiceAccountToken: false
enableServiceLinks: false # a service called paceline-server would set PACELINE_SERVER_PORT
securityContext: {{- include "paceline.podSecurity" . | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "paceline.claims" -}}
{{- $name := include "paceline.name" . -}}
- name: models
  persistentVolumeClaim: { claimName: {{ .Values.volumes.models.existingClaim | default (printf "%s-models" $name) }} }
- name: drafts
  persistentVolumeClaim: { claimName: {{ .Values.volumes.drafts.existingClaim | default (printf "%s-drafts" $name) }} }
- name: tmp
  emptyDir: {}
{{- end }}
