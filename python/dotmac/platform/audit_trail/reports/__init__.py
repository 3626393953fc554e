"""Compliance reports: a module per framework says its sections, one runs them, one holds what came of it.

What a section looks for, beside categories: actions by their words (`user.create`, `role.grant`,
`change.deploy`, `access.review`, `audit.read`, `breach.detected`, `*.break_glass`), and these keys of
metadata: `subject_id`, `patient_id`, `data_category`, `purpose`, `recipient`, `requester`, `approver`,
`author`, `deployer`, `ticket`, `change_id`, `environment`, `justification`, `session_id`, `method`,
`user_agent`, `period`, `findings`, `notified_at`, `consequences`, `measures`, `scope`.
"""
