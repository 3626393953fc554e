"""Compliance reports: a module per framework says its sections, `build` runs them, `model` holds the result.

What a section looks for, beside categories: actions by their words (`user.create`, `role.grant`,
`change.deploy`, `access.review`, `audit.read`, `breach.detected`, `*.break_glass`), and keys of metadata.
docs/howto/audit-reports.md lists them by framework.
"""
