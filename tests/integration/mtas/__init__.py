"""What has to be the same behind Postfix and behind Sendmail."""
